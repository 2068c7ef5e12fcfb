"""The images and the teacher that a cache was made from, compared with its plan."""

from scalekd.cache.documents.manifest import DataInfo
from scalekd.errors import CacheMismatch, UsageError, rewording
from scalekd.images import ImageDataset
from scalekd.loading import open_images
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


def open_source(options: CacheSources) -> ImageDataset:
    """Open the whole image set.

    Raises:
        UsageError: ``data_dir`` is not given.
    """
    if options.data_dir is None:
        raise UsageError(
            f"{options.cache}: views must be drawn again; pass --data-dir, the images the"
            " cache was made from"
        )
    copies = make_local_cache(options.local_cache, options.local_cache_size)
    return open_images(
        options.data_dir, options.split, local_cache=copies, options=options.image_options
    )


def select_images(options: CacheSources, opened: ImageDataset, data: DataInfo) -> ImageDataset:
    """Take the images of the cache, in its order.

    Args:
        options: Where the images of the cache are.
        opened: The whole image set.
        data: The plan's description of the images of the cache.

    Raises:
        CacheMismatch: It is another image set.
    """
    images = opened.with_fingerprint(data.fingerprint, data.num_samples)
    if images is None:
        raise CacheMismatch(
            f"{opened.location} is not the image set of {options.cache}: {len(opened):,} samples"
            f" here, {data.num_samples:,} there, or other keys, labels or sizes; pass the"
            " --data-dir, --split and options of the image set that the cache was made with"
        )
    return images


def teacher_config(options: CacheSources, cached: TeacherSpec) -> TeacherConfig:
    """Say how to load the teacher of the cache.

    Args:
        options: Its name and weights on this machine.
        cached: The plan's description of it.

    Raises:
        UsageError: Its name is not to be trusted, or its weights were read from a file that
            is not given.
    """
    if cached.weights_source == "checkpoint" and options.checkpoint is None:
        raise UsageError(
            f"{options.cache}: its teacher {cached.model} was read from a file; pass it as"
            " --checkpoint"
        )
    kwargs = {**cached.model_kwargs, "num_classes": cached.num_classes or 0}
    return TeacherConfig(
        model=options.model or teacher_named_by_cache(cached.model, option="--model"),
        checkpoint=options.checkpoint,
        pretrained=cached.weights_source == "pretrained",
        model_kwargs={**kwargs, **options.model_kwargs},
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
        UsageError, EnvironmentFault: It cannot be built or its weights cannot be read.
        CacheMismatch: It is another one.
    """
    with rewording({", or --no-pretrained for random ones": "", " and --img-size": ""}):
        teacher = load_teacher(teacher_config(options, cached))
    here, there = teacher.spec.model_dump(mode="json"), cached.model_dump(mode="json")
    different = [
        f"{name} is {there[name]} in the cache, {here[name]} here"
        for name in here
        if name not in ABOUT_ORIGIN and here[name] != there[name]
    ]
    if different:
        raise CacheMismatch(f"{options.cache}: another teacher: {'; '.join(different)}")
    return teacher
