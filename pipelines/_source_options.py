"""Options of commands that need a cache's images and teacher; importing them imports no torch."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ByteSize, Field

from scalekd.options import ImageOptions, StoredBytes, Workers


class CacheSources(ImageOptions):
    """Location of a cache, and of the images and the teacher that it was made from."""

    headings: ClassVar[dict[str, str]] = {
        "cache": "Images and teacher",
        "labels": "How images are read",
        "workers": "Computation",
    }

    cache: str | Path
    """Folder or URL of the cache."""
    data_dir: str | None = None
    """Folder, URL or pattern of the images the cache was made from."""
    split: str = "train"
    """Name, folder or pattern of these images."""
    model: str | None = None
    """Name of the teacher on this machine, if the name in the cache cannot be used."""
    checkpoint: str | None = None
    """File of the teacher's weights, if they were read from a file."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Argument of the teacher's constructor as key=value; repeat the option for more."""
    workers: Workers | None = None
    """Number of processes that draw views; if not given, two without a GPU, and otherwise a number
    that depends on the cores."""
    local_cache: str | None = None
    """Folder for copies of remote image shards."""
    local_cache_size: StoredBytes = ByteSize(100 * 10**9)
    """Largest size of --local-cache, such as 500GB; the copies that were used longest ago are
    deleted."""


class ExtendConfig(CacheSources):
    """Options of ``scalekd cache extend``; those that are ``None`` are taken from the cache."""

    headings: ClassVar[dict[str, str]] = {
        "cache": "Images and teacher",
        "passes": "What is added",
        "pretrained": "Another teacher",
        "labels": "How images are read",
        "workers": "Computation",
    }
    common: ClassVar[tuple[str, ...]] = (
        "data_dir",
        "split",
        "passes",
        "name",
        "model",
        "stages",
        "logits",
        "codec",
        "workers",
    )

    cache: str | Path
    """Folder of the cache."""
    data_dir: str
    """Folder, URL or pattern of the images the cache was made from."""
    model: str | None = None
    """With --name, another teacher, named as in cache-teacher; without --name, the name of the
    cache's teacher on this machine."""
    passes: int | None = Field(default=None, ge=1, le=9999)
    """Number of passes that the cache will have; with --name, at most as many as the cache has,
    which is the default."""
    name: str | None = None
    """Name of an extension: add targets in extensions/NAME/ instead of passes to the cache."""
    stages: tuple[Literal[3, 4], ...] | None = None
    """Stages whose features the extension keeps: 3,4, final (stage 4) or none; if not given, none,
    or final if it keeps no logits."""
    logits: str | None = None
    """Logits that the extension keeps: full for all classes, topk:K for the K likeliest, or
    none."""
    codec: str | None = None
    """Codec of the features of the extension: transform[:error=E] for a mean error E, float16 or
    int8."""
    note: str | None = None
    """Text to keep in the manifest of the extension."""
    shards: tuple[int, int] | None = None
    """Work on these shards only, as A-B, both included."""
    pretrained: bool = True
    """Read the published weights of another teacher; without them and without a checkpoint, weights
    are random."""
    teacher_classes: Path | None = None
    """File with the names of another teacher's classes, one per line, in the order of its
    logits."""
    class_map: str | None = None
    """Another teacher's class of each label: auto to match by name; none to match by number; or a
    file with one number or name per line; auto if not given."""
    licence: str | None = None
    """Licence of another teacher's weights."""


class RepairConfig(CacheSources):
    """Options of ``scalekd cache repair``."""

    remove_extra: bool = False
    """Delete files that do not belong to the cache."""


class VerifyConfig(CacheSources):
    """Options of ``scalekd cache verify``."""

    headings: ClassVar[dict[str, str]] = {
        "quick": "Verification",
        "cache": "Images and teacher, for --deep",
        "labels": "How images are read",
    }

    quick: bool = False
    """Check records and file sizes only, without reading the data."""
    deep: int | None = Field(default=None, ge=1)
    """Also draw this many views again, run the teacher on them, and compare both with the cache."""


class DoctorConfig(ImageOptions):
    """Options of ``scalekd doctor``."""

    headings: ClassVar[dict[str, str]] = {
        "cache": "What is checked",
        "labels": "How images are read",
    }

    cache: str | None = None
    """Folder or URL of a cache to check."""
    data_dir: str | None = None
    """Folder, URL or pattern of an image set to check; with --cache, of the images that the cache
    was made from."""
    split: str = "train"
    """Name, folder or pattern of these images."""
    views: int = Field(default=64, ge=1)
    """Number of views to draw again."""
    images: int = Field(default=2000, ge=0)
    """Number of images of --data-dir to decode, spread over the set; 0 decodes all. Not used with
    --cache."""


class ShowConfig(CacheSources):
    """Options of ``scalekd cache show``."""

    headings: ClassVar[dict[str, str]] = {
        "output": "Page",
        "keys": "Choice of views",
        "cache": "Images and teacher",
        "labels": "How images are read",
    }
    common: ClassVar[tuple[str, ...]] = (
        "output",
        "keys",
        "class_name",
        "worst",
        "views",
        "teacher",
        "data_dir",
        "split",
    )

    output: Path = Path("cache.html")
    """HTML file to write; an existing file is replaced."""
    teacher: bool = False
    """Run the teacher on the shown views, and show its features beside the stored ones and the
    error of each token."""
    sample: int = Field(default=20_000, ge=0)
    """Number of views whose logits are read for the histogram and the accuracy by class; 0 reads
    all."""
    keys: tuple[str, ...] | None = None
    """Key of a sample to show; repeat the option for more."""
    class_name: str | None = None
    """Name or number of the only class whose samples are shown."""
    worst: int | None = Field(default=None, ge=1, le=1000)
    """Show this many views with the largest coding error, among sixteen times as many random ones
    (at least 256) on which the teacher is run."""
    views: int = Field(default=12, ge=1, le=1000)
    """Number of random views to show if neither --keys nor --worst is given."""
    pass_index: int = Field(default=0, ge=0)
    """Number of the pass whose views are shown."""
