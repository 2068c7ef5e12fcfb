"""The images and the teacher that a cache was made with, found again and held against its plan."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, ConfigDict, Field

from scalekd.cache.forms import read_form
from scalekd.cache.manifest import Identity
from scalekd.errors import CacheMismatch, UsageError, rewording
from scalekd.image_options import ImageOptions
from scalekd.images import ImageDataset
from scalekd.loading import open_images
from scalekd.loading.drawing import DrawnViews
from scalekd.pipelines._cache_config import DEFAULT_LOCAL_CACHE_BYTES, CacheTeacherConfig
from scalekd.storage import make_local_cache, parse_size
from scalekd.teachers import (
    ABOUT_ORIGIN,
    Teacher,
    TeacherConfig,
    TeacherSpec,
    load_teacher,
    teacher_named_by_cache,
)
from scalekd.views import ViewPolicy


class SameJob(ImageOptions):
    """Where a cache is, and what it was made from.

    Attributes:
        cache: Folder or URL of the cache.
        data_dir: The images, when views must be drawn again.
        split: Which of them; see :func:`scalekd.images.open_dataset`.
        model: The teacher's name here, when the manifest's does not resolve.
        checkpoint: The teacher's weights, when the cache was made from a file.
        model_kwargs: Arguments of the model, over the manifest's.
        workers: Processes that draw views.
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
    workers: int = Field(default=2, ge=0)
    local_cache: str | None = None
    local_cache_size: Annotated[int, BeforeValidator(parse_size)] = DEFAULT_LOCAL_CACHE_BYTES


class TeacherAgain:
    """The images and the teacher that a cache was made with, looked up when first needed.

    Args:
        config: Where they are.
        identity: What they must be.
    """

    def __init__(self, config: SameJob, identity: Identity) -> None:
        self._config, self._identity = config, identity

    @cached_property
    def images(self) -> ImageDataset:
        """The image set.

        Raises:
            UsageError: Nobody said where it is.
            CacheMismatch: It is another one.
        """
        data, config = self._identity.data, self._config
        if config.data_dir is None:
            raise UsageError(
                f"{config.cache}: views must be drawn again; pass --data-dir, the images the"
                " cache was made from"
            )
        kept = make_local_cache(config.local_cache, config.local_cache_size)
        opened = open_images(
            config.data_dir, config.split, local_cache=kept, options=config.image_options
        )
        images = opened.with_fingerprint(data.fingerprint, data.num_samples)
        if images is None:
            raise CacheMismatch(
                f"{opened.place} is not the image set of {config.cache}: {len(opened):,} samples"
                f" here, {data.num_samples:,} there, or other keys, labels or sizes; pass the"
                " --data-dir, --split and options of the image set that the cache was made with"
            )
        return images

    @cached_property
    def drawn(self) -> DrawnViews:
        """The cache's views of the images, and the images that it embeds."""
        views, form = self._identity.views, read_form(self._config.cache)
        return DrawnViews(
            self.images,
            ViewPolicy.from_config(views.policy),
            views.seed,
            views.view_size,
            skip_corrupt=self._identity.skip_corrupt,
            embed=form.embed,
        )

    @property
    def teacher_config(self) -> TeacherConfig:
        """The teacher to load.

        Raises:
            UsageError: Its name is not to be trusted, or its weights were read from a file.
        """
        cached, config = TeacherSpec.model_validate(self._identity.teacher), self._config
        if cached.weights_source == "checkpoint" and config.checkpoint is None:
            raise UsageError(
                f"{config.cache}: its teacher {cached.model} was read from a file; pass it as"
                " --checkpoint"
            )
        kwargs = {**cached.model_kwargs, "num_classes": cached.num_classes or 0}
        return TeacherConfig(
            model=config.model or teacher_named_by_cache(cached.model, option="--model"),
            checkpoint=config.checkpoint,
            pretrained=cached.weights_source == "pretrained",
            model_kwargs={**kwargs, **config.model_kwargs},
            img_size=cached.img_size,
            mean=cached.mean,
            std=cached.std,
            tail_blocks=cached.tail_blocks,
            class_names=cached.class_names,
            keep_head=True,
        )

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher.

        Raises:
            UsageError, EnvironmentFault: It cannot be built or its weights cannot be read.
            CacheMismatch: It is another one.
        """
        cached, config = TeacherSpec.model_validate(self._identity.teacher), self._config
        with rewording({", or --no-pretrained for random ones": "", " and --img-size": ""}):
            teacher = load_teacher(self.teacher_config)
        here, there = teacher.spec.model_dump(mode="json"), cached.model_dump(mode="json")
        different = [
            f"{name} is {there[name]} in the cache, {here[name]} here"
            for name in here
            if name not in ABOUT_ORIGIN and here[name] != there[name]
        ]
        if different:
            raise CacheMismatch(f"{config.cache}: another teacher: {'; '.join(different)}")
        found = torch.accelerator.current_accelerator(check_available=True)
        return teacher.to(found or torch.device("cpu"))

    def stage_one(self, output: Path) -> CacheTeacherConfig:
        """The configuration that made the cache, writing to ``output``."""
        identity, form = self._identity, read_form(self._config.cache)
        policy = ViewPolicy.from_config(identity.views.policy)
        return CacheTeacherConfig(
            teacher=TeacherConfig(model=str(identity.teacher["model"])),
            data_dir=self._config.data_dir or "",
            split=self._config.split,
            **dict(self._config.image_options),
            output=output,
            stages=tuple(identity.request["stages"]),
            logits=identity.request["logits"],
            codec=identity.request["codec"],
            aug=str(policy),
            interpolation=policy.interpolation,
            seed=identity.views.seed,
            limit=identity.data.num_samples,
            batch_size=identity.batch_size,
            workers=self._config.workers,
            local_cache=self._config.local_cache,
            local_cache_size=self._config.local_cache_size,
            precision=identity.precision,
            shard_size=identity.shard_size,
            block_size=identity.block_size,
            skip_corrupt=identity.skip_corrupt,
            format=form.name,
            embed=form.embed,
        )
