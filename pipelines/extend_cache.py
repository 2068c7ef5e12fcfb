"""Adding to a cache: passes, or targets under a name, without touching what is there.

    scalekd cache extend ./swin_l-cache --data-dir /imagenet --passes 8
    scalekd cache extend ./swin_l-cache --data-dir /imagenet --name beit --model beit_l

Passes are added to the cache itself. Targets of other stages, or of another teacher, make an
extension: a cache of its own in ``extensions/NAME/`` over the same views, which every shard's
pixel hashes are held against before it is committed.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field

from scalekd.cache import CacheReader, open_cache
from scalekd.cache.extensions import check_fits, extension_path
from scalekd.cache.layout import SAMPLES
from scalekd.cache.manifest import Identity
from scalekd.cache.planning import read_plan
from scalekd.codecs import DEFAULT_FEATURE_CODEC, parse_codec
from scalekd.errors import CacheMismatch, UsageError
from scalekd.image_options import ImageOptions
from scalekd.loading.drawing import DrawnViews
from scalekd.models.classes import read_class_names
from scalekd.pipelines._cache_config import DEFAULT_LOCAL_CACHE_BYTES, CacheTeacherConfig
from scalekd.pipelines._same_job import SameJob, TeacherAgain
from scalekd.pipelines._same_pixels import check_pixels
from scalekd.pipelines.cache_teacher import CacheTeacherResult, cache_teacher
from scalekd.storage import parse_size
from scalekd.teachers import TeacherConfig


class ExtendConfig(ImageOptions):
    """What ``scalekd cache extend`` was asked for; what is ``None`` is as in the cache.

    Attributes:
        cache: Folder of the cache.
        data_dir: The images the cache was made from.
        split: Which of them.
        passes: Passes to have in the end; of an extension at most those of the cache.
        name: Of the extension; ``None`` adds passes to the cache itself.
        stages: Stages whose features the extension keeps.
        logits: ``full``, ``topk:K`` or ``none``.
        codec: Codec of the extension's features.
        model: Another teacher; without ``name``, the name of the cache's teacher here.
        checkpoint: The teacher's weights on disk.
        model_kwargs: Arguments of the model.
        teacher_classes: File with the names of another teacher's classes.
        class_map: The other teacher's class of each label; see `CacheTeacherConfig`.
        pretrained: Read the published weights of another teacher.
        licence: Of another teacher's weights.
        note: Free text for the extension's manifest.
        shards: First and last shard this command is to do.
        workers: Processes that draw views.
        local_cache: Folder for copies of remote image shards.
        local_cache_size: Bytes that these copies may take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    cache: Path
    data_dir: str
    split: str = "train"
    passes: int | None = Field(default=None, ge=1, le=9999)
    name: str | None = None
    stages: tuple[Literal[3, 4], ...] | None = None
    logits: str | None = None
    codec: str | None = None
    model: str | None = None
    checkpoint: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    teacher_classes: Path | None = None
    class_map: str | None = None
    pretrained: bool = True
    licence: str | None = None
    note: str | None = None
    shards: tuple[int, int] | None = None
    workers: int = Field(default=2, ge=0)
    local_cache: str | None = None
    local_cache_size: Annotated[int, BeforeValidator(parse_size)] = DEFAULT_LOCAL_CACHE_BYTES


def extend_cache(config: ExtendConfig) -> CacheTeacherResult:
    """Add what was asked for, or go on adding it.

    Raises:
        UsageError: Nothing to add was named, or something that only an extension can have.
        CacheMismatch: Images, views or teacher are not those of the cache.
        ScaleKDError: As for :func:`~scalekd.pipelines.cache_teacher.cache_teacher`.
    """
    base = open_cache(config.cache)
    if config.name is None:
        return cache_teacher(_more_passes(config, base))
    folder = config.cache / extension_path(config.name)
    passes = config.passes or base.num_passes
    if passes > base.num_passes:
        raise UsageError(
            f"--passes {passes}: {config.cache} has {base.num_passes}, and an extension has views"
            f" of the cache only; first `scalekd cache extend {config.cache} --passes {passes}`"
        )
    standing = read_plan(folder)
    if standing is not None:
        _refuse_changes(config, standing.identity)
        job = _again(config, standing.identity, folder)
        if config.teacher_classes is not None:  # compared with those of the plan
            names = read_class_names(config.teacher_classes)
            teacher = job.teacher.model_copy(update={"class_names": names})
            job = job.model_copy(update={"teacher": teacher})
    else:
        job = _new_extension(config, base.identity, folder)
    job = job.model_copy(
        update={
            "passes": passes,
            "class_map": config.class_map or "auto",
            "shards": config.shards,
            "licence": config.licence,
            "note": config.note,
        }
    )
    return cache_teacher(job, around=ViewsOf(base, same_teacher=config.model is None))


class ViewsOf:
    """Holds what is being written against the cache that it extends.

    Args:
        base: That cache, opened.
        same_teacher: Whether the targets are to come from its teacher.
    """

    def __init__(self, base: CacheReader, *, same_teacher: bool) -> None:
        self._base = base
        self._same_teacher = same_teacher

    @property
    def identity(self) -> Identity:
        """That of the cache."""
        return self._base.identity

    def check_plan(self, wanted: Identity) -> None:
        """Raise ``CacheMismatch`` unless samples, views and shards are to be those of the cache."""
        base = self._base.identity
        check_fits(base, wanted, where="what --name is to add")
        ours, theirs = wanted.teacher["weights_sha256"], base.teacher["weights_sha256"]
        if self._same_teacher and ours != theirs:
            raise CacheMismatch(
                f"{self._base.place}: its teacher has weights {theirs[:12]}…, and the one here"
                f" {ours[:12]}…; to add another teacher's targets name it with --model"
            )

    def check_pixels(self, drawn: DrawnViews) -> None:
        """Raise ``CacheMismatch`` unless this machine draws the views of the cache."""
        base = self._base
        check_pixels(base.storage, base.manifest.plan, base.layout, drawn)

    def check_shard(
        self, unit: int, shard: int, samples_sha256: str, pixel_hashes: np.ndarray[Any, Any]
    ) -> None:
        """Raise ``CacheMismatch`` unless a shard's samples and pixels are those of the cache."""
        record = self._base.record(SAMPLES, shard)
        where = f"{self._base.place}: shard {shard}"
        if samples_sha256 != record.samples_sha256:
            raise CacheMismatch(f"{where}: the images now give other samples than it was made from")
        first = int(self._base.samples.starts[shard])
        rows = self._base.read_rows(unit, first, record.num_rows, ["pixel_hash"])
        if not np.array_equal(rows["pixel_hash"], pixel_hashes):
            raise CacheMismatch(
                f"{where} of pass {unit}: this machine draws other pixels than the cache's teacher"
                " saw; add to it with the versions that `scalekd cache info` names"
            )


def _more_passes(config: ExtendConfig, base: CacheReader) -> CacheTeacherConfig:
    only_named = ("stages", "logits", "codec", "teacher_classes", "class_map", "licence", "note")
    given = [name for name in only_named if getattr(config, name) is not None]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')}: a cache keeps the targets it was begun with; give"
            " --name to add others beside them"
        )
    if config.passes is None:
        raise UsageError("nothing to add: give --passes, or --name with --model or --stages")
    if config.passes < base.num_passes:
        raise UsageError(f"--passes {config.passes}: {config.cache} has {base.num_passes} already")
    job = _again(config, base.identity, config.cache)
    return job.model_copy(update={"passes": config.passes, "shards": config.shards})


def _refuse_changes(config: ExtendConfig, standing: Identity) -> None:
    """Targets are chosen when an extension is begun; later commands may name them again."""
    asked = {
        "stages": None if config.stages is None else sorted(config.stages),
        "logits": config.logits,
        "codec": None if config.codec is None else str(parse_codec(config.codec)),
    }
    for option, wanted in asked.items():
        found = standing.request[option]
        if wanted is not None and wanted != (sorted(found) if option == "stages" else found):
            raise CacheMismatch(
                f"--{option}: {config.name} of {config.cache} was begun with {found}, and {wanted}"
                " is asked for; give another --name"
            )


def _again(config: ExtendConfig, identity: Identity, output: Path) -> CacheTeacherConfig:
    """The job that made a cache or an extension, to go on with."""
    again = _job(config, identity, output)
    return again.stage_one(output).model_copy(update={"teacher": again.teacher_config})


def _job(config: ExtendConfig, identity: Identity, output: Path) -> TeacherAgain:
    asked = SameJob(
        cache=output,
        data_dir=config.data_dir,
        split=config.split,
        **dict(config.image_options),
        model=config.model,
        checkpoint=config.checkpoint,
        model_kwargs=config.model_kwargs,
        workers=config.workers,
        local_cache=config.local_cache,
        local_cache_size=config.local_cache_size,
    )
    return TeacherAgain(asked, identity)


def _new_extension(config: ExtendConfig, base: Identity, output: Path) -> CacheTeacherConfig:
    """The job of an extension that is to be begun: the cache's, with other targets."""
    if config.model is None and config.stages is None and config.logits is None:
        raise UsageError(
            f"--name {config.name}: nothing to keep under this name; give --model, --stages or"
            " --logits"
        )
    again = _job(config, base, output)
    if config.model is None:
        teacher = again.teacher_config
    else:
        teacher = TeacherConfig(
            model=config.model,
            checkpoint=config.checkpoint,
            pretrained=config.pretrained,
            model_kwargs=config.model_kwargs,
            img_size=base.views.view_size,
            class_names=read_class_names(config.teacher_classes),
        )
    return again.stage_one(output).model_copy(
        update={
            "teacher": teacher,
            "stages": config.stages or (),
            "logits": config.logits or (None if config.model else "none"),
            "codec": config.codec or DEFAULT_FEATURE_CODEC,
            "embed": "none",  # the cache around it holds the images
        }
    )
