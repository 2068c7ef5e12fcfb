"""Deep verification: draw a sample of the views again and run the teacher on them again.

    scalekd cache verify ./swin_l-cache --deep 64 --data-dir /imagenet

Checksums show that a cache contains the bytes that were written. Deep verification shows that these
bytes belong to the given images, views and teacher.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scalekd.cache import CacheReader, open_cache
from scalekd.cache.forms import read_form
from scalekd.cache.layout import MANIFEST_FILE
from scalekd.codecs.measure import view_errors
from scalekd.errors import CacheMismatch, UsageError
from scalekd.images.samples import ImageDataset, Sample
from scalekd.loading.embedded import EmbeddedImages
from scalekd.loading.views import DrawnView, draw_view, replay_view, stored_params
from scalekd.pipelines._arithmetic import default_device, strict_float32
from scalekd.pipelines._job import Job, views_of
from scalekd.pipelines._source_options import CacheSources
from scalekd.pipelines._sources import open_source, select_images
from scalekd.pipelines._teacher_stream import TeacherArrays
from scalekd.pipelines._write_shards import run_teacher
from scalekd.pipelines.inspect_cache import DeepFindings
from scalekd.signals import terminable
from scalekd.teachers import Teacher, TeacherSpec, load_tail_bytes
from scalekd.views import pixel_hash

# The stated error of a codec is the maximum over at most 128 held-out views; others may exceed it.
_SLACK = 4.0
# Relative squared error from rounding alone, with another batch size or processor.
_ROUNDING = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-4}
_LOGIT_ERROR = 1e-5  # relative squared error from storing logits in 16 bits
_VIEWS_OF_A_CONTINUED_CACHE = 4
_UNSTATED = 0.05  # used if the cache states no error: too few views to hold any out

Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredView:
    """One view as the cache stores it, and its sample."""

    pass_index: int
    row: int
    sample: Sample
    arrays: dict[str, Rows]

    def __str__(self) -> str:
        return f"pass {self.pass_index}, sample {self.sample.key}"


def chosen_views(
    reader: CacheReader, images: ImageDataset, count: int, groups: tuple[str, ...]
) -> Iterator[StoredView]:
    """Yield about ``count`` views, evenly spread over passes and samples.

    Raises:
        CacheMismatch: The image set lacks a sample of the cache.
        CacheCorrupt: A file differs from the committed one.
    """
    names = [
        array.name
        for array in reader.layout.views
        if array.name.split("/")[0] in (*groups, "view", "pixel_hash")
    ]
    num_samples = len(reader.samples)
    total = num_samples * len(reader.passes)
    positions = images.positions(reader.samples.keys)
    for number in np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64)).tolist():
        pass_position, row = divmod(number, num_samples)
        pass_index = reader.passes[pass_position]
        if positions[row] < 0:
            raise CacheMismatch(
                f"{images.location} lacks sample {reader.samples.key(row)!r} of {reader.location};"
                " --data-dir must be the data set the cache was made from"
            )
        yield StoredView(
            pass_index,
            row,
            images[int(positions[row])],
            reader.read_rows(pass_index, row, 1, names),
        )


def drawing_problem(reader: CacheReader, view: StoredView) -> tuple[DrawnView, str | None]:
    """Draw a view again from the seed and from its stored parameters; describe the difference."""
    views, stored_hash = reader.identity.views, int(view.arrays["pixel_hash"][0])
    source_hash = int(reader.samples.source_hashes[view.row])
    drawn = draw_view(
        view.sample,
        reader.policy,
        seed=views.seed,
        pass_index=view.pass_index,
        view_size=views.view_size,
    )
    params = stored_params(view.arrays, 0, reader.policy)
    replayed = pixel_hash(replay_view(view.sample, params, view_size=views.view_size))
    if view.sample.source_hash != source_hash:
        return drawn, "is another image than the one the teacher saw"
    if int(reader.samples.labels[view.row]) != view.sample.label:
        return (
            drawn,
            f"has label {reader.samples.labels[view.row]}, {view.sample.label} in the data",
        )
    if replayed != stored_hash:
        return (
            drawn,
            f"is redrawn differently (pixel hash {stored_hash:016x}, {replayed:016x} here)",
        )
    if drawn.pixel_hash != stored_hash:
        return drawn, "is not the view that the cache's seed draws: its parameters were changed"
    return drawn, None


def check_images_named(config: CacheSources) -> None:
    """Raise ``UsageError`` if views cannot be drawn again because no images are available."""
    if config.data_dir is None and read_form(config.cache).embed != "source":
        raise UsageError(
            f"{config.cache}: --deep draws views again, and the cache does not contain encoded"
            " images; pass --data-dir"
        )


def tail_problem(reader: CacheReader, teacher: Teacher) -> str | None:
    """Compare the cache's tail with the teacher's last stage; describe the difference.

    The constant prefix tokens are means over calibration views, and are not compared.
    """
    identity = reader.identity
    if identity.tail is None or not reader.part.has_tail:
        return None
    where = reader.storage.locate(identity.tail)
    stored = load_tail_bytes(reader.file(identity.tail, identity.tail_digest), where).state_dict()
    for name, own in teacher.tail().state_dict().items():
        if name == "prefix_tokens":
            continue
        kept = stored[name].to(torch.float64)
        if not torch.allclose(kept, own.cpu().to(torch.float64), rtol=1e-6, atol=1e-6):
            return f"{where}: {name.removeprefix('model.')} is not the teacher's"
    return None


@terminable()
@strict_float32()
def deep_verify(config: CacheSources, num_views: int) -> DeepFindings:
    """Compare the tail with the teacher's, and ``num_views`` views with those drawn again.

    The pixel hashes are compared, and the stored targets with the teacher's outputs.

    Raises:
        DataError: The cache or the images do not exist.
        CacheError: The cache is damaged, or the images or the teacher are not those of the cache.
        UsageError: ``data_dir`` is not given, and the cache embeds no images.
    """
    reader = open_cache(config.cache)
    identity = reader.identity
    if config.data_dir is None and reader.embed == "source":
        images: ImageDataset = EmbeddedImages.of(reader)
    else:
        images = select_images(config, open_source(config), identity.data, reader.samples.keys)
    job = Job.of(reader.cache, config, drawn=views_of(reader.cache, images))
    return _compared(reader, images, job.to(default_device()).teacher, num_views)


@strict_float32()
def check_same_outputs(job: Job) -> None:
    """Check that a job's teacher gives what the complete cache that it continues keeps.

    The hash of its weights identifies a model of timm. The code of a user's module may have changed
    besides.

    Raises:
        CacheMismatch: The outputs for some views differ by more than codec and rounding explain.
    """
    if not job.output.exists(MANIFEST_FILE):
        return
    reader, spec = open_cache(job.output), job.teacher.spec
    known = TeacherSpec.model_validate(reader.identity.teacher)
    same_images = reader.identity.data.fingerprint == job.images.fingerprint
    if not same_images or (known.weights_sha256, known.stages) != (
        spec.weights_sha256,
        spec.stages,
    ):
        return  # which is reported with everything else that differs
    findings = _compared(reader, job.images, job.teacher, _VIEWS_OF_A_CONTINUED_CACHE)
    for name, error in findings.largest_error.items():
        if not error <= _allowed(reader, name):
            raise CacheMismatch(
                f"{reader.location}: the teacher's {name} differ now from those in the cache by"
                f" {error:.2g} (relative squared error), although its weights are the same; if the"
                " code of its module has changed, choose another output or overwrite the cache"
            )


def _compared(
    reader: CacheReader, images: ImageDataset, teacher: Teacher, num_views: int
) -> DeepFindings:
    """Compare tail, pixels and targets of a cache with those of a teacher on its device."""
    groups = tuple(f"stage{stage}" for stage in reader.codecs.stages)
    groups += ("logits",) if reader.codecs.logits else ()
    groups = tuple(group for group in groups if reader.part.has_target(group))
    problems = list(filter(None, [tail_problem(reader, teacher)]))
    largest: dict[str, float] = {}
    num_seen = 0
    for view in chosen_views(reader, images, num_views, groups):
        num_seen += 1
        drawn, problem = drawing_problem(reader, view)
        if problem is not None:
            problems.append(f"{view}: {problem}")
            continue
        pixels = torch.from_numpy(drawn.pixels).permute(2, 0, 1)[None].contiguous()
        output = run_teacher(teacher, pixels, reader.identity.precision)
        for name, error in _errors(reader, view, output):
            largest[name] = max(largest.get(name, 0.0), error)
            allowed = _allowed(reader, name)
            if not error <= allowed:
                problems.append(
                    f"{view}: the teacher's {name} differ now by {error:.2g} (relative squared"
                    f" error); codec and rounding explain {allowed:.2g}"
                )
    return DeepFindings(num_views=num_seen, problems=tuple(problems), largest_error=largest)


def _errors(
    reader: CacheReader, view: StoredView, output: TeacherArrays
) -> Iterator[tuple[str, float]]:
    for stage, codec in reader.codecs.stages.items():
        if not reader.part.has_target(f"stage{stage}"):
            continue
        with torch.inference_mode():
            decoded = codec.decoder()(_planes(view, f"stage{stage}")).numpy()
        yield (
            f"stage{stage}",
            float(view_errors(output.features[stage], decoded, codec.shape)["raw"][0]),
        )
    if (
        reader.codecs.logits is None
        or output.logits is None
        or not reader.part.has_target("logits")
    ):
        return
    with torch.inference_mode():
        kept = reader.codecs.logits.decoder()(_planes(view, "logits"))
    live = torch.from_numpy(output.logits)
    if "logits" in kept:
        stored = kept["logits"]
    else:
        stored = kept["log_probs"]
        live = live.log_softmax(dim=1).gather(1, kept["indices"])
    yield "logits", float((stored - live).square().sum() / live.square().sum().clamp(min=1e-12))


def _planes(view: StoredView, group: str) -> dict[str, torch.Tensor]:
    start = f"{group}/"
    return {
        name.removeprefix(start): torch.from_numpy(rows)
        for name, rows in view.arrays.items()
        if name.startswith(start)
    }


def _allowed(reader: CacheReader, name: str) -> float:
    rounding = _ROUNDING[reader.identity.precision]
    if name == "logits":
        return _LOGIT_ERROR + rounding
    stated = reader.manifest.plan.provenance.measured.get(name.removeprefix("stage"))
    return _SLACK * (stated["raw"]["max"] if stated else _UNSTATED) + rounding
