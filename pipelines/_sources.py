"""The images and the teacher that a cache was made from, compared with its plan."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from scalekd.cache.manifest import DataInfo
from scalekd.errors import CacheMismatch, UsageError, rewording
from scalekd.image_options import ImageOptions
from scalekd.images import ImageDataset
from scalekd.loading import open_images
from scalekd.pipelines._arithmetic import default_num_workers
from scalekd.pipelines._cache_config import DEFAULT_LOCAL_CACHE_BYTES
from scalekd.storage import make_local_cache, parse_size
from scalekd.teachers import (
    ABOUT_ORIGIN,
    Teacher,
    TeacherConfig,
    TeacherSpec,
    load_teacher,
    teacher_named_by_cache,
)


class CacheSources(ImageOptions):
    """Where a cache is, and where the images and the teacher are that it was made from.

    Attributes:
        cache: Folder or URL of the cache.
        data_dir: The images, when views must be drawn again.
        split: Which of them; see :func:`scalekd.images.open_dataset`.
        model: The teacher's name here, when the manifest's does not resolve.
        checkpoint: The teacher's weights, when the cache was made from a file.
        model_kwargs: Arguments of the model, over the manifest's.
        workers: Processes that draw views; by the cores and the device when not given.
        local_cache: Folder for copies of remote image shards.
        local_cache_size: Bytes that these copies may take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    cache: str | Path
    data_dir: str | None = None
    split: str = "train"
    model: str | None = None
    checkpoint: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    workers: int = Field(default_factory=default_num_workers, ge=0)
    local_cache: str | None = None
    local_cache_size: Annotated[int, BeforeValidator(parse_size)] = DEFAULT_LOCAL_CACHE_BYTES

    def open(self) -> ImageDataset:
        """Open the whole image set.

        Raises:
            UsageError: ``data_dir`` is not given.
        """
        if self.data_dir is None:
            raise UsageError(
                f"{self.cache}: views must be drawn again; pass --data-dir, the images the"
                " cache was made from"
            )
        copies = make_local_cache(self.local_cache, self.local_cache_size)
        return open_images(
            self.data_dir, self.split, local_cache=copies, options=self.image_options
        )

    def images(self, opened: ImageDataset, data: DataInfo) -> ImageDataset:
        """Take the images of the cache, in its order.

        Args:
            opened: The whole image set.
            data: The plan's description of the images of the cache.

        Raises:
            CacheMismatch: It is another image set.
        """
        images = opened.with_fingerprint(data.fingerprint, data.num_samples)
        if images is None:
            raise CacheMismatch(
                f"{opened.location} is not the image set of {self.cache}: {len(opened):,} samples"
                f" here, {data.num_samples:,} there, or other keys, labels or sizes; pass the"
                " --data-dir, --split and options of the image set that the cache was made with"
            )
        return images

    def teacher_config(self, cached: TeacherSpec) -> TeacherConfig:
        """Say how to load the teacher of the cache.

        Args:
            cached: The plan's description of it.

        Raises:
            UsageError: Its name is not to be trusted, or its weights were read from a file that
                is not given.
        """
        if cached.weights_source == "checkpoint" and self.checkpoint is None:
            raise UsageError(
                f"{self.cache}: its teacher {cached.model} was read from a file; pass it as"
                " --checkpoint"
            )
        kwargs = {**cached.model_kwargs, "num_classes": cached.num_classes or 0}
        return TeacherConfig(
            model=self.model or teacher_named_by_cache(cached.model, option="--model"),
            checkpoint=self.checkpoint,
            pretrained=cached.weights_source == "pretrained",
            model_kwargs={**kwargs, **self.model_kwargs},
            img_size=cached.img_size,
            mean=cached.mean,
            std=cached.std,
            tail_blocks=cached.tail_blocks,
            class_names=cached.class_names,
            keep_head=True,
        )

    def teacher(self, cached: TeacherSpec) -> Teacher:
        """Load the teacher of the cache, on the CPU.

        Raises:
            UsageError, EnvironmentFault: It cannot be built or its weights cannot be read.
            CacheMismatch: It is another one.
        """
        with rewording({", or --no-pretrained for random ones": "", " and --img-size": ""}):
            teacher = load_teacher(self.teacher_config(cached))
        here, there = teacher.spec.model_dump(mode="json"), cached.model_dump(mode="json")
        different = [
            f"{name} is {there[name]} in the cache, {here[name]} here"
            for name in here
            if name not in ABOUT_ORIGIN and here[name] != there[name]
        ]
        if different:
            raise CacheMismatch(f"{self.cache}: another teacher: {'; '.join(different)}")
        return teacher
