"""Options of commands that write or move caches; importing them does not import torch."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ByteSize, Field

from scalekd.options import (
    DEFAULT_FEATURE_CODEC,
    Embed,
    ImageOptions,
    ImageSize,
    Options,
    StoredBytes,
    Workers,
)
from scalekd.views import Interpolation


class TeacherOptions(Options):
    """Options that choose the teacher of a cache."""

    headings: ClassVar[dict[str, str]] = {"model": "Teacher"}
    common: ClassVar[tuple[str, ...]] = ("model", "checkpoint")

    model: str
    """Teacher: a timm name, an alias (scalekd models), hf-hub:NAME or local-dir:FOLDER."""
    checkpoint: str | None = None
    """Weights on disk: a safetensors file or a state dict."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Argument of the teacher's constructor as key=value; repeat the option for more."""
    pretrained: bool = True
    """Read the published weights; without them and without a checkpoint, weights are random."""
    img_size: ImageSize | None = None
    """Size of the views in pixels, as S for a square or H,W for height and width; if not given, the
    teacher's own size."""
    teacher_classes: Path | None = None
    """File with the names of the teacher's classes, one per line, in the order of its logits; if
    not given, the names in its config.json or in timm."""


class CacheOptions(ImageOptions):
    """Options that choose images, views, targets and form of a cache."""

    headings: ClassVar[dict[str, str]] = {
        "data_dir": "Images and cache",
        "labels": "How images are read",
        "passes": "Views",
        "stages": "Targets",
        "batch_size": "Computation",
        "local_cache": "Files",
    }
    common: ClassVar[tuple[str, ...]] = (
        "data_dir",
        "output",
        "labels",
        "passes",
        "aug",
        "codec",
        "batch_size",
        "workers",
    )
    """Fields whose options the help lists first."""

    data_dir: str
    """Folder, URL or pattern of the images."""
    output: str | Path
    """Folder or URL of the cache."""
    split: str = "train"
    """Name, folder or pattern of the images to cache."""
    limit: int | None = Field(default=None, ge=1)
    """Take this many samples from the beginning of the image set; all if not given."""
    skip_corrupt: bool = False
    """Leave corrupt images out, and count them, instead of stopping at the first."""
    overwrite: bool = False
    """Delete the cache at --output first."""

    passes: int = Field(default=1, ge=1, le=9999)
    """Number of views of every sample."""
    budget: str | None = None
    """Limit of the cache's size, of the time in which one process writes it, or of both, such as
    200GB, 40h or 200GB,40h; it determines --passes and --codec unless they are given."""
    aug: str = "crop-flip"
    """View policy: components joined by +, such as crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25;
    `--aug help` explains them all."""
    interpolation: Interpolation = "bicubic"
    """Resize filter of the views, where bilinear-opencv is cv2.resize without antialiasing."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the views."""

    stages: tuple[Literal[3, 4], ...] = (3, 4)
    """Stages whose features are kept: 3,4, final (stage 4) or none."""
    logits: str | None = None
    """Logits that are kept: full for all classes, topk:K for the K likeliest, or none; if not
    given, full for a teacher with a classifier and none for others."""
    codec: str = DEFAULT_FEATURE_CODEC
    """Codec of the features: transform[:error=E] for a mean error E, which is 0.01 if not given;
    float16; or int8."""
    class_map: str = "auto"
    """The teacher's class of each label: auto to match by name; none to match by number; or a file
    with one number or name per line."""
    licence: str | None = Field(default=None, min_length=1, max_length=1000)
    """Licence of the teacher's weights; if not given, the one that timm records."""
    note: str | None = Field(default=None, max_length=100_000)
    """Text to keep in the manifest."""

    batch_size: int = Field(default=64, ge=1)
    """Number of views in a forward pass of the teacher; it affects rounding, and therefore the
    bytes of the cache."""
    workers: Workers | None = None
    """Number of processes that draw views; if not given, two without a GPU, and otherwise a number
    that depends on the cores."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the teacher: auto is the precision of an existing cache and, for a new one, bf16
    on GPUs that support it and fp32 elsewhere."""
    torchcompile: str | None = None
    """Compile the teacher with this backend of torch.compile; inductor if no backend is named."""
    shards: tuple[int, int] | None = None
    """Work on these shards only, as A-B, both included."""
    shard_size: int | None = Field(default=None, ge=1, le=1 << 24)
    """Number of views in a shard; if not given, it depends on the number of samples."""

    local_cache: str | None = None
    """Folder for copies of remote image shards."""
    local_cache_size: StoredBytes = ByteSize(100 * 10**9)
    """Largest size of --local-cache, such as 500GB; the copies that were used longest ago are
    deleted."""
    format: Literal["zarr", "webdataset"] = "zarr"
    """Form of the cache: zarr for arrays that are read together with the image set, webdataset for
    tars that can be streamed."""
    embed: Embed = "none"
    """Images in the cache: none; pixels for the rendered views in a form that loads fast; or, in
    tars, source for the encoded files and view for the rendered views as image files."""


class ConvertConfig(ImageOptions):
    """Options of ``scalekd cache convert``."""

    headings: ClassVar[dict[str, str]] = {"source": "Conversion", "labels": "How images are read"}

    source: str
    """Folder or URL of the cache."""
    output: str
    """Folder of the new cache."""
    format: Literal["zarr", "webdataset"]
    """Form of the new cache: zarr for arrays that are read together with the image set, webdataset
    for tars."""
    embed: Embed = "none"
    """Images in the cache: none; pixels for the rendered views in a form that loads fast; or, in
    tars, source for the encoded files and view for the rendered views as image files."""
    data_dir: str | None = None
    """Folder, URL or pattern of the images the cache was made from, which --embed needs."""
    split: str = "train"
    """Name, folder or pattern of these images."""
    workers: Workers = 2
    """Number of processes that read images."""
    shards: tuple[int, int] | None = None
    """Work on these shards only, as A-B, both included."""


class ShareConfig(Options):
    """Options of ``scalekd cache push`` and ``scalekd cache pull``."""

    headings: ClassVar[dict[str, str]] = {"source": "What is copied", "jobs": "Transfer"}

    source: str
    """Folder or URL of the cache."""
    target: str
    """Folder or URL of the copy."""
    passes: tuple[int, int] | None = None
    """Copy these passes only, as A-B, both included."""
    shards: tuple[int, int] | None = None
    """Copy these shards only, as A-B, both included."""
    stages: tuple[Literal[3, 4], ...] | None = None
    """Copy these stages only: 3,4, final (stage 4) or none."""
    logits_only: bool = False
    """Copy logits and views, without features and the teacher's tail."""
    jobs: int = Field(default=8, ge=1, le=64)
    """Number of files that are copied at once."""
    check: bool = False
    """Read the files that the target already has, and replace those that differ."""
    read_back: bool = True
    """Read each file back from a remote target, and check it."""


class MergeConfig(Options):
    """Options of ``scalekd cache merge``."""

    parts: tuple[Path, ...]
    """Folders of the parts, complete or incomplete."""
    output: Path
    """Folder of the joined cache."""
    copy_files: bool = False
    """Copy every file instead of making hard links."""


class ListConfig(Options):
    """Options of ``scalekd cache ls``."""

    root: str
    """Folder or URL to search."""
    depth: int = Field(default=4, ge=0, le=64)
    """Number of folder levels below ROOT to search."""


class InfoConfig(Options):
    """Options of ``scalekd cache info``."""

    cache: str
    """Folder or URL of the cache."""


class ExportTargetsConfig(Options):
    """Options of ``scalekd cache export``."""

    headings: ClassVar[dict[str, str]] = {"cache": "What is exported", "to": "File"}

    cache: str
    """Folder or URL of the cache."""
    what: Literal["logits", "pooled", "tokens"]
    """Values to export: logits, pooled for one vector per view (--pool), or tokens for all features
    of a stage."""
    stage: Literal[3, 4] = 4
    """Stage of the features, 3 or 4."""
    pool: Literal["mean", "class"] = "mean"
    """Vector of a view for --what pooled: the mean of the patch tokens, or the class token."""
    passes: tuple[int, int] | None = None
    """Export these passes only, as A-B, both included; all passes if not given."""
    keys: tuple[str, ...] | None = None
    """Key of a sample to export; repeat the option for more, which are written in this order; all
    samples if not given."""
    to: Literal["npy", "parquet", "safetensors"]
    """Form of the export: npy for a folder of NumPy arrays, parquet for a table with one row per
    view, or safetensors for one file of tensors."""
    output: Path
    """Folder or file to write, which must not exist."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the exported values."""
