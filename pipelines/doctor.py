"""Report the versions of this machine, and whether it redraws a cache's views exactly.

scalekd doctor --cache ./swin_l-cache --data-dir /imagenet
"""

import contextlib
import importlib.metadata
import io
import os
import platform

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from scalekd.cache import CacheReader, open_cache
from scalekd.codecs import create_logit_codec
from scalekd.errors import CacheMismatch, DataError, ScaleKDError
from scalekd.images import ImageDataset
from scalekd.loading import open_images
from scalekd.loading.embedded import EmbeddedImages
from scalekd.loading.views import ReplayContract
from scalekd.options import ImageOptions
from scalekd.pipelines._arithmetic import num_cores
from scalekd.pipelines.check_images import ImageCheck, check_images
from scalekd.pipelines.check_replay import chosen_views, drawing_problem
from scalekd.storage import Location
from scalekd.views import ViewPolicy, draw, pixel_environment, render

_PACKAGES = ("scalekd", "torch", "timm", "accelerate", "zarr", "numcodecs", "pcodec", "webdataset")
_ANY_DRIFT = 255.0


class CacheDrift(BaseModel):
    """Differences between a cache's views and the same views drawn on this machine.

    Attributes:
        path: Folder of the cache.
        environment_differs: Library versions that affect pixels, as ``(in the cache, here)``.
        software_differs: Library versions that affect targets, as ``(in the cache, here)``.
        num_witnesses: Number of views whose pixels the cache stores; 0 without images.
        witness_drift: Largest mean absolute difference of a witness, in levels of 255.
        num_views: Number of other views drawn again.
        num_exact: Number of these views whose pixels are identical.
        problems: Descriptions of the views that differ.
    """

    path: str
    environment_differs: dict[str, tuple[str, str]]
    software_differs: dict[str, tuple[str, str]]
    num_witnesses: int = 0
    witness_drift: float | None = None
    num_views: int = 0
    num_exact: int = 0
    problems: tuple[str, ...] = ()

    @property
    def drifts(self) -> bool:
        """Whether the pixels of any view differ."""
        return bool(self.problems) or bool(self.witness_drift)

    def lines(self) -> list[str]:
        """Return the comparison as lines of text."""
        lines = [
            f"{name}: {there} in the cache, {here} here (affects {what})"
            for what, differing in (
                ("pixels", self.environment_differs),
                ("targets", self.software_differs),
            )
            for name, (there, here) in differing.items()
        ]
        if not self.environment_differs:
            lines.append("all library versions that affect pixels are those of the cache")
        if not self.num_views:
            return [*lines, "no view was drawn again: pass --data-dir to compare pixels"]
        compared = (
            f"{self.num_exact} of {self.num_views} views are identical; mean difference of"
            f" {self.num_witnesses} witnesses at most {self.witness_drift or 0:.3g}/255"
        )
        return [*lines, compared, *self.problems[:5]]


class ImageSet(BaseModel):
    """Summary of an image set.

    Attributes:
        place: Path or name of the image set.
        num_samples: Number of images.
        num_labelled: Number of images with a label.
        num_classes: Number of classes.
        notes: Messages about files that were left out and defaults that were chosen.
        check: Result of decoding images; ``None`` if no image was decoded.
    """

    place: str
    num_samples: int
    num_labelled: int
    num_classes: int
    notes: tuple[str, ...]
    check: ImageCheck | None = None

    @classmethod
    def of(cls, images: ImageDataset, check: ImageCheck | None) -> "ImageSet":
        """Summarize an image set."""
        return cls(
            place=images.location,
            num_samples=len(images),
            num_labelled=int((images.labels >= 0).sum()),
            num_classes=images.num_classes,
            notes=images.notes,
            check=check,
        )

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        counts = (
            f"{self.num_samples:,} images, {self.num_labelled:,} of them with a label,"
            f" {self.num_classes:,} classes"
        )
        checked = self.check.lines(self.num_samples) if self.check else ()
        return [counts, *self.notes, *checked]


class Diagnosis(BaseModel):
    """Result of ``scalekd doctor``."""

    versions: dict[str, str]
    machine: dict[str, str]
    works: dict[str, str]
    cache: CacheDrift | None
    images: ImageSet | None

    def lines(self) -> list[str]:
        """Return each section as its title and indented lines."""
        facts = {"versions": self.versions, "machine": self.machine, "works": self.works}
        sections = {
            title: [f"{name:<26}{fact}" for name, fact in values.items()]
            for title, values in facts.items()
        }
        if self.images is not None:
            sections[f"images {self.images.place}"] = self.images.lines()
        if self.cache is not None:
            sections[f"cache {self.cache.path}"] = self.cache.lines()
        return [
            line for title, rows in sections.items() for line in (title, *(f"  {r}" for r in rows))
        ]

    def failure(self) -> ScaleKDError | None:
        """Return an error if images are unreadable, or drawn differently than for the cache."""
        drift, check = self.cache, self.images.check if self.images is not None else None
        if self.images is not None and check is not None and check.num_unreadable:
            return DataError(
                f"{self.images.place}: {check.num_unreadable:,} of {check.num_decoded:,} images"
                f" cannot be decoded, first: {check.problems[0]}. Replace or remove them, or leave"
                " them out with cache-teacher --skip-corrupt"
            )
        if drift is None or not drift.drifts:
            return None
        return CacheMismatch(
            f"{drift.path}: this machine does not redraw it exactly (mean difference up to"
            f" {drift.witness_drift or 0:.3g}/255). Install the versions of the cache, or train"
            " with --allow-pixel-drift X"
        )


def diagnose(
    cache: Location | None = None,
    *,
    data_dir: str | None = None,
    split: str = "train",
    image_options: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
    num_views: int = 64,
    num_images: int = 2000,
) -> Diagnosis:
    """Examine this machine and, if given, a cache and an image set.

    Args:
        cache: Location of a cache.
        data_dir: Location of an image set; with ``cache``, the images it was made from.
        split: Split of the image set.
        image_options: How the samples of the image set are read.
        num_views: Number of views of the cache to draw again.
        num_images: Number of images to decode if no cache is given; all if 0.

    Raises:
        DataError: The cache or the images do not exist.
        CacheError: The cache is damaged, or the images are not those of the cache.
    """
    drift = images = None
    if data_dir is not None:
        images = open_images(data_dir, split, options=image_options)
    check = None
    if images is not None and cache is None:
        check = check_images(images, num_images, num_cores())
    about_images = None if images is None else ImageSet.of(images, check)
    if cache is not None:
        reader = open_cache(cache)
        if images is None and reader.embed == "source":
            images = EmbeddedImages.of(reader)
        drift = cache_drift(reader, images, num_views)
    return Diagnosis(
        versions=_versions(), machine=_machine(), works=_works(), cache=drift, images=about_images
    )


def cache_drift(reader: CacheReader, images: ImageDataset | None, num_views: int) -> CacheDrift:
    """Compare versions and, given the images, draw witnesses and ``num_views`` views again."""
    views = reader.identity.views
    drift = CacheDrift(
        path=reader.location,
        environment_differs=_differing(views.environment, pixel_environment()),
        software_differs=_differing(reader.manifest.plan.provenance.software, _versions()),
    )
    if images is None:
        return drift
    contract = ReplayContract.of(reader, allowed_drift=_ANY_DRIFT)
    pixels = list(reader.witnesses)
    positions = images.positions(reader.samples.keys[: len(pixels)])
    if (positions < 0).any():
        raise CacheMismatch(
            f"{images.location} lacks the first samples of {reader.location}; --data-dir must be"
            " the data set the cache was made from"
        )
    witnesses = [images[int(position)] for position in positions]
    for row, sample in enumerate(witnesses):
        contract.check_source(sample, int(reader.samples.source_hashes[row]))
    problems, num_seen = [], 0
    for view in chosen_views(reader, images, num_views, ()):
        num_seen += 1
        _, problem = drawing_problem(reader, view)
        if problem is not None:
            problems.append(f"{view}: {problem}")
    return drift.model_copy(
        update={
            "num_witnesses": len(witnesses),
            "witness_drift": contract.check_witnesses(witnesses, pixels),
            "num_views": num_seen,
            "num_exact": num_seen - len(problems),
            "problems": tuple(problems),
        }
    )


def _differing(there: dict[str, str], here: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {
        name: (version, here.get(name, "none"))
        for name, version in sorted(there.items())
        if here.get(name, "none") != version
    }


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {**versions, **pixel_environment()}


def _machine() -> dict[str, str]:
    device = torch.accelerator.current_accelerator(check_available=True)
    name = str(device or "none")
    if device is not None and device.type == "cuda":
        name = f"{torch.accelerator.device_count()} x {torch.cuda.get_device_name()}"
    facts = {
        "system": f"{platform.system()} {platform.release()}",
        "accelerator": name,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
        "torch threads": str(torch.get_num_threads()),
    }
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        facts["open files"] = f"{soft:,} (at most {hard:,})"
    return facts


def _works() -> dict[str, str]:
    """Try the operations that both stages need; return ``yes`` or the error of each trial."""
    trials = {
        "drawing views": _try_drawing,
        "coding arrays": _try_coding,
        "processes on CPUs (gloo)": _try_gloo,
    }
    results = {}
    for name, trial in trials.items():
        try:
            trial()
            results[name] = "yes"
        except Exception as error:  # a broken installation may raise any exception
            results[name] = f"no: {type(error).__name__}: {error}"
    return results


def _try_drawing() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(buffer, "JPEG")
    image = Image.open(buffer).convert("RGB")
    policy = ViewPolicy.parse("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:1.0")
    params = draw(policy, seed=0, key="k", pass_index=0, source_size=(30, 40), view_size=(16, 16))
    render(image, params, view_size=(16, 16))


def _try_coding() -> None:
    codec = create_logit_codec("topk:2", num_classes=4)
    logits = np.arange(8, dtype=np.float32).reshape(2, 4)
    if codec.decode(codec.encode(logits))["indices"].tolist() != [[3, 2], [3, 2]]:
        raise RuntimeError("decoded logits differ from the encoded ones")


def _try_gloo() -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise RuntimeError("torch was built without gloo")
