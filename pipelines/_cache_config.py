"""Options of ``scalekd cache-teacher``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from scalekd.cache.forms import Embed, Form, form_named
from scalekd.codecs import DEFAULT_FEATURE_CODEC
from scalekd.image_options import ImageOptions
from scalekd.pipelines._arithmetic import default_num_workers
from scalekd.storage import parse_size
from scalekd.teachers import TeacherConfig
from scalekd.views import Interpolation

DEFAULT_LOCAL_CACHE_BYTES = 100 * 10**9


class CacheTeacherConfig(ImageOptions):
    """Options of ``scalekd cache-teacher``.

    Attributes:
        teacher: The teacher to run.
        data_dir: Folder, URL or pattern of the images.
        split: Split of the image set; see :func:`scalekd.images.open_dataset`.
        output: Folder or URL of the cache.
        passes: Views of every sample.
        stages: Stages whose features are kept.
        logits: ``full``, ``topk:K`` or ``none``; when ``None``, ``full`` of a teacher that has a
            classifier, and ``none`` of another.
        class_map: The teacher's class of each label: ``auto``, by name; ``none``, by number; or a
            file, see `scalekd.models.classes.read_class_map`.
        codec: Codec of the features.
        aug: View policy; see :class:`scalekd.views.ViewPolicy`.
        interpolation: Filter of every resize and geometric operation of the views.
        seed: Seed of the view generator.
        limit: Number of samples to take, from the first on; all when ``None``.
        shards: First and last shard that this command writes; all when ``None``.
        batch_size: Views a teacher forward. It decides rounding, so it is part of the cache.
        workers: Processes that draw views; by the cores and the device when not given.
        precision: Precision of the teacher's arithmetic. ``auto`` is that of the cache that is
            continued; for a new one, bfloat16 where the device has it and float32 elsewhere.
        torchcompile: Backend of ``torch.compile`` for the teacher, if it is to be compiled.
        shard_size: Views a shard; chosen from the number of samples when ``None``.
        block_size: Views a block; at most 256, and a divisor of the shard size, when ``None``.
        skip_corrupt: Leave corrupt images out instead of stopping.
        overwrite: Delete the cache at ``output`` first.
        licence: Licence of the teacher's weights; as timm records it when ``None``.
        local_cache: Folder for copies of remote image shards.
        local_cache_size: Bytes that these copies may take.
        note: Free text for the manifest.
        format: Form of the cache: Zarr arrays beside the image set, or WebDataset tars.
        embed: What images the tars hold: none, the encoded files, or the rendered views.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: TeacherConfig
    data_dir: str
    split: str = "train"
    output: str | Path
    passes: int = Field(default=1, ge=1, le=9999)
    stages: tuple[Literal[3, 4], ...] = (3, 4)
    logits: str | None = None
    class_map: str = "auto"
    codec: str = DEFAULT_FEATURE_CODEC
    aug: str = "crop-flip"
    interpolation: Interpolation = "bicubic"
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    limit: int | None = Field(default=None, ge=1)
    shards: tuple[int, int] | None = None
    batch_size: int = Field(default=64, ge=1)
    workers: int = Field(default_factory=default_num_workers, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    torchcompile: str | None = None
    shard_size: int | None = Field(default=None, ge=1, le=1 << 24)
    block_size: int | None = Field(default=None, ge=1, le=1 << 16)
    skip_corrupt: bool = False
    overwrite: bool = False
    licence: str | None = Field(default=None, min_length=1, max_length=1000)
    local_cache: str | None = None
    local_cache_size: Annotated[int, BeforeValidator(parse_size)] = DEFAULT_LOCAL_CACHE_BYTES
    note: str | None = Field(default=None, max_length=100_000)
    format: Literal["zarr", "webdataset"] = "zarr"
    embed: Embed = "none"

    @property
    def form(self) -> Form:
        """The form of the cache."""
        return form_named(self.format, self.embed)
