"""Write a page that shows what a cache contains: views, stored features, the teacher's answers.

    scalekd cache show ./swin_l-cache --data-dir /imagenet --teacher --output cache.html

The page is one file without references to others. Without the images it shows the data in the
cache: the pixels of the first views, features and answers.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from scalekd.cache import CacheReader, open_cache
from scalekd.codecs.measure import view_errors
from scalekd.errors import UsageError
from scalekd.images import ImageDataset
from scalekd.loading.embedded import EmbeddedImages
from scalekd.pipelines._arithmetic import default_device, strict_float32
from scalekd.pipelines._cache_answers import read_answers
from scalekd.pipelines._cache_page import CachePage, render_page
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._shown_views import ShownView, ViewChooser, ViewSource
from scalekd.pipelines._source_options import ShowConfig
from scalekd.pipelines._sources import load_cached_teacher, open_source, select_images
from scalekd.pipelines._write_shards import run_teacher
from scalekd.pipelines.inspect_cache import cache_info
from scalekd.shapes import FeatureShape
from scalekd.signals import terminable
from scalekd.storage.files import commit_file
from scalekd.teachers import Teacher, TeacherSpec
from scalekd.text import format_bytes

_CANDIDATES = 16  # drawn views for each of the worst that are shown
_LEAST_CANDIDATES = 256
_BATCH = 16

Errors = dict[int, dict[int, float]]
"""Coding error of views, by row and stage."""


class ShownCache(BaseModel):
    """Result of ``scalekd cache show``.

    Attributes:
        output: The page.
        num_bytes: Size of the page.
        keys: Keys of the shown samples, in order.
        num_without_pixels: Number of shown views whose image was not available.
        errors: Spatial coding error of each shown view, by stage; empty without the teacher.
        teacher_top1: Percent of the labelled views that were read whose likeliest class is the
            label; ``None`` if they are not compared.
    """

    output: str
    num_bytes: int
    keys: tuple[str, ...]
    num_without_pixels: int
    errors: tuple[dict[str, float], ...]
    teacher_top1: float | None

    def lines(self) -> Iterator[str]:
        """Yield the result as lines of text."""
        if self.num_without_pixels:
            yield (
                f"{self.num_without_pixels} of {len(self.keys)} views have no picture: pass"
                " --data-dir, the images the cache was made from"
            )
        if self.teacher_top1 is not None:
            yield f"the teacher's top-1 on the views that were read: {self.teacher_top1:.2f} %"
        yield f"{self.output}: {len(self.keys)} views, {format_bytes(self.num_bytes)}"


@terminable()
@strict_float32()
def show_cache(config: ShowConfig) -> ShownCache:
    """Write the page of a cache.

    Raises:
        UsageError: The options contradict one another, or the teacher is needed and cannot run.
        DataError: The cache, its images or a requested sample or class do not exist.
        CacheError: The cache is damaged, or the images or the teacher are not those of the cache.
    """
    if config.keys and (config.worst or config.class_name):
        raise UsageError("--keys names the views to show: leave out --worst and --class")
    reader = open_cache(config.cache)
    spec = TeacherSpec.model_validate(reader.identity.teacher)
    images = _images(config, reader)
    source = ViewSource(reader, config.pass_index, images)
    rows, errors, teacher = _chosen(config, reader, source, spec)
    views = []
    with ProgressReport("reading views", len(rows), aside=lambda: "decoded") as progress:
        for row in rows:
            views.append(source.read(row))
            progress.advance(1)
    if teacher is not None:
        errors |= _run(teacher, reader, views)
    page = CachePage(
        info=cache_info(reader.storage),
        spec=spec,
        shapes={stage: codec.shape for stage, codec in reader.codecs.stages.items()},
        class_names=reader.identity.data.class_names,
        data_fingerprint=reader.identity.data.fingerprint,
        num_labelled=int((reader.samples.labels >= 0).sum()),
        pass_index=config.pass_index,
        choice=_choice(config),
        views=views,
        errors=errors,
        answers=read_answers(reader, spec, config.pass_index, config.sample),
    )
    text = render_page(page)
    commit_file(config.output, text.encode())
    accuracy = page.answers.accuracy if page.answers else None
    return ShownCache(
        output=str(config.output),
        num_bytes=len(text.encode()),
        keys=tuple(view.key for view in views),
        num_without_pixels=sum(view.pixels is None for view in views),
        errors=tuple(
            {str(stage): error for stage, error in errors[view.row].items()}
            for view in views
            if view.row in errors
        ),
        teacher_top1=None if accuracy is None else 100 * accuracy,
    )


def _images(config: ShowConfig, reader: CacheReader) -> ImageDataset | None:
    """Open the images that the cache was made from; ``None`` if they are not available."""
    if config.data_dir is not None:
        return select_images(config, open_source(config), reader.identity.data, reader.samples.keys)
    return EmbeddedImages.of(reader) if reader.embed == "source" else None


def _chosen(
    config: ShowConfig, reader: CacheReader, source: ViewSource, spec: TeacherSpec
) -> tuple[list[int], Errors, Teacher | None]:
    """Choose rows; return them, the errors that were measured to choose, and the teacher."""
    chooser = ViewChooser(reader)
    teacher = None
    if config.teacher or config.worst:
        if not reader.codecs.stages:
            raise UsageError(
                f"{reader.location}: stores no features, so there is no coding error; leave out"
                " --teacher and --worst"
            )
        teacher = load_cached_teacher(config, spec).to(default_device()).eval()
    if config.keys:
        return chooser.by_keys(config.keys), {}, teacher
    if not config.worst or teacher is None:
        return chooser.drawn(config.views, config.class_name), {}, teacher
    candidates = chooser.drawn(
        max(_CANDIDATES * config.worst, _LEAST_CANDIDATES), config.class_name
    )
    errors: Errors = {}
    with ProgressReport("comparing with the teacher", len(candidates)) as progress:
        for start in range(0, len(candidates), _BATCH):
            views = [source.read(row) for row in candidates[start : start + _BATCH]]
            errors |= _run(teacher, reader, views)
            progress.advance(len(views))
    worst = sorted(errors, key=lambda row: (-max(errors[row].values()), row))
    return worst[: config.worst], errors, teacher


def _run(teacher: Teacher, reader: CacheReader, views: Iterable[ShownView]) -> Errors:
    """Run the teacher on views, keep its features, and measure the errors of the stored ones.

    Raises:
        UsageError: The pixels of a view are not available.
    """
    errors: Errors = {}
    for view in views:
        if view.pixels is None:
            raise UsageError(
                f"{reader.location}: the teacher needs the pixels of the views, and the cache"
                " does not contain them; pass --data-dir"
            )
        pixels = torch.from_numpy(view.pixels.copy()).permute(2, 0, 1)[None].contiguous()
        output = run_teacher(teacher, pixels, reader.identity.precision)
        errors[view.row] = {}
        for stage, stored in view.features.items():
            shape = reader.codecs.stages[stage].shape
            live = output.features[stage][0, shape.num_prefix_tokens :]
            view.live[stage] = live
            error = _spatial_error(live, stored, shape)
            errors[view.row][stage] = error if math.isfinite(error) else 1.0
    return errors


def _spatial_error(live: Any, stored: Any, shape: FeatureShape) -> float:
    patches = FeatureShape(shape.grid, shape.num_channels, 0)
    return float(view_errors(np.asarray(live)[None], stored[None], patches)["spatial"][0])


def _choice(config: ShowConfig) -> str:
    """Describe how the views were chosen."""
    of_class = f" of class {config.class_name}" if config.class_name else ""
    if config.keys:
        return "chosen by key"
    if config.worst:
        return f"with the largest coding error among those compared{of_class}"
    return f"drawn at random{of_class}"
