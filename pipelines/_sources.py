"""Open the images and the teacher that a cache was made from, and compare them with its plan."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from scalekd.cache.documents.manifest import DataInfo
from scalekd.errors import CacheMismatch, UsageError, rewording
from scalekd.images import ImageDataset
from scalekd.images.samples import Rows
from scalekd.loading import open_images
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._progress import doing
from scalekd.pipelines._source_options import CacheSources
from scalekd.storage import make_local_cache
from scalekd.teachers import (
    ABOUT_ORIGIN,
    Teacher,
    TeacherConfig,
    TeacherSpec,
    load_teacher,
    teacher_named_by_cache,
)


def index_images(data_dir: str, options: CacheSources | CacheTeacherConfig) -> ImageDataset:
    """Open an image set whole; report the step if it takes long."""
    copies = make_local_cache(options.local_cache, options.local_cache_size)
    with doing(f"indexing the images of {data_dir}") as step:
        opened = open_images(
            data_dir, options.split, local_cache=copies, options=options.image_options
        )
        step.result = f"{len(opened):,} images, {opened.num_classes:,} classes"
    return opened


def open_source(options: CacheSources) -> ImageDataset:
    """Open the image set that a cache was made from, whole.

    Raises:
        UsageError: ``data_dir`` is not given.
    """
    if options.data_dir is None:
        raise UsageError(
            f"{options.cache}: views must be drawn again; pass --data-dir, the images the"
            " cache was made from"
        )
    return index_images(options.data_dir, options)


def select_images(
    options: CacheSources, opened: ImageDataset, data: DataInfo, keys: Rows | None = None
) -> ImageDataset:
    """Select the images of the cache from its image set, in the order of the cache.

    Args:
        options: Location of the cache, for messages.
        opened: The whole image set.
        data: The plan's description of the images of the cache.
        keys: Keys of the cache in its order, if they have been read; without them, ``opened`` must
            have its samples in the order of the cache.

    Raises:
        CacheMismatch: ``opened`` is another image set.
    """
    images = opened.with_fingerprint(data.fingerprint, data.num_samples, keys)
    if images is None:
        raise CacheMismatch(
            f"{opened.location} is not the image set of {options.cache}: {len(opened):,} samples"
            f" here, {data.num_samples:,} there, or other keys, labels, sizes or order; pass the"
            " --data-dir, --split and options of the image set that the cache was made with"
        )
    return images


def same_teacher(
    cached: TeacherSpec,
    *,
    model: str,
    checkpoint: str | None,
    pretrained: bool,
    model_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> TeacherConfig:
    """Return the configuration that loads the teacher of a cache.

    Args:
        cached: The plan's description of the teacher.
        model: Name of the teacher on this machine.
        checkpoint: File of its weights, if they are not the published ones.
        pretrained: Whether to read the published weights if no file is given.
        model_kwargs: Arguments of its constructor besides those in the plan.
    """
    kwargs = {**cached.model_kwargs, "num_classes": cached.num_classes or 0}
    return TeacherConfig(
        model=model,
        checkpoint=checkpoint,
        pretrained=pretrained,
        model_kwargs={**kwargs, **model_kwargs},
        img_size=cached.img_size,
        mean=cached.mean,
        std=cached.std,
        tail_blocks=cached.tail_blocks,
        class_names=cached.class_names,
        keep_head=True,
    )


def load_cached_teacher(options: CacheSources, cached: TeacherSpec) -> Teacher:
    """Load the teacher of the cache, on the CPU.

    Raises:
        UsageError: The name in the cache is not trusted, or the weights were read from a file
            that is not given.
        UsageError, EnvironmentFault: The model cannot be built or its weights cannot be read.
        CacheMismatch: The model is not the teacher of the cache.
    """
    if cached.weights_source == "checkpoint" and options.checkpoint is None:
        raise UsageError(
            f"{options.cache}: its teacher {cached.model} was read from a file; pass it as"
            " --checkpoint"
        )
    config = same_teacher(
        cached,
        model=options.model or teacher_named_by_cache(cached.model, option="--model"),
        checkpoint=options.checkpoint,
        pretrained=cached.weights_source == "pretrained",
        model_kwargs=options.model_kwargs,
    )
    with rewording({", or --no-pretrained for random ones": "", " and --img-size": ""}):
        teacher = load_teacher(config)
    here, there = teacher.spec.model_dump(mode="json"), cached.model_dump(mode="json")
    different = [
        f"{name} is {there[name]} in the cache, {here[name]} here"
        for name in here
        if name not in ABOUT_ORIGIN and here[name] != there[name]
    ]
    if different:
        raise CacheMismatch(f"{options.cache}: another teacher: {'; '.join(different)}")
    return teacher
