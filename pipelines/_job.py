"""A job of stage one: which views of which images, through which teacher, kept in which form."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from scalekd.cache.documents.manifest import (
    ClassMap,
    CodecInfo,
    DataInfo,
    Identity,
    Plan,
    Request,
    StageInfo,
    ViewsInfo,
)
from scalekd.cache.files import FileDigest
from scalekd.cache.forms import Form
from scalekd.cache.writing.planning import differences
from scalekd.codecs import parse_codec
from scalekd.errors import CacheMismatch
from scalekd.images import ImageDataset
from scalekd.loading import open_images
from scalekd.loading.drawing import DrawnViews
from scalekd.models.classes import Classes, ClassMatch, classes_of_data
from scalekd.pipelines._arithmetic import (
    auto_precision,
    compute_environment,
    default_num_workers,
)
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._classes import choose_logits, match_labels, stored_map
from scalekd.pipelines._preflight import check_options, check_output, check_shards
from scalekd.pipelines._progress import doing
from scalekd.pipelines._sizes import default_block_size, default_shard_size
from scalekd.pipelines._source_options import CacheSources
from scalekd.pipelines._sources import load_cached_teacher, open_source, select_images
from scalekd.pipelines._teacher_stream import EncoderName, default_encoder
from scalekd.storage import make_local_cache
from scalekd.teachers import (
    ABOUT_ORIGIN,
    Teacher,
    TeacherSpec,
    load_teacher,
)
from scalekd.views import ViewPolicy, pixel_environment


@dataclass(frozen=True)
class Tables:
    """The files that calibration makes, as the plan of a cache names them.

    Attributes:
        stages: Codec of each stage that is kept.
        logits: Codec of the logits; ``None`` if they are not kept.
        tail: Path and digest of the teacher's tail; ``None`` twice if it is not kept.
        witnesses: Path and digest of the witness views' pixels.
        environment: Versions that drew the first views.
        measured: Errors of each stage's codec on views held out of its fit; decides no byte.
    """

    stages: dict[Literal["3", "4"], StageInfo]
    logits: CodecInfo | None
    tail: tuple[str, FileDigest] | tuple[None, None]
    witnesses: tuple[str, FileDigest]
    environment: dict[str, str] = field(default_factory=pixel_environment)
    measured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, identity: Identity) -> Self:
        """Those of an existing cache."""
        tail: tuple[str, FileDigest] | tuple[None, None] = (None, None)
        if identity.tail is not None and identity.tail_digest is not None:
            tail = (identity.tail, identity.tail_digest)
        return cls(
            stages=identity.stages,
            logits=identity.logits,
            tail=tail,
            witnesses=(identity.views.witnesses, identity.views.witnesses_digest),
            environment=identity.views.environment,
        )


@dataclass(frozen=True)
class Job:
    """What stage one is to do.

    Attributes:
        drawn: The views: images, policy, seed, size, and what of the images is embedded.
        teacher: The teacher.
        request: The targets to keep.
        precision: Precision of the teacher's arithmetic.
        batch_size: Views a forward; it decides rounding.
        shard_size: Views a shard.
        block_size: Views a block.
        form: Form of the cache.
        workers: Processes that draw views.
        compiler: Backend of ``torch.compile`` by which the teacher is compiled, if it is.
        match: The teacher's class of each label; ``None`` where labels are not compared.
        class_map: What a new plan keeps of ``match``.
        class_names: Names that were given for the teacher's classes, if any were.
        notes: What to tell the user before the job begins.
    """

    drawn: DrawnViews
    teacher: Teacher
    request: Request
    precision: Literal["fp32", "bf16", "fp16"]
    batch_size: int
    shard_size: int
    block_size: int
    form: Form
    workers: int
    compiler: str | None = None
    match: ClassMatch | None = None
    class_map: ClassMap | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def asked(
        cls, config: CacheTeacherConfig, device: torch.device, *, teacher: Teacher | None = None
    ) -> Self:
        """Make the job that a configuration asks for.

        Args:
            config: What is asked for.
            device: Device of the teacher; it decides what ``--precision auto`` is.
            teacher: The teacher itself, instead of the one that ``config.teacher`` names.

        Raises:
            ScaleKDError: Whatever can be found wrong before the teacher runs.
        """
        check_options(config, named=teacher is None)
        plan = check_output(config.output, config.form, overwrite=config.overwrite)
        copies = make_local_cache(config.local_cache, config.local_cache_size)
        with doing(f"indexing the images of {config.data_dir}") as step:
            opened = open_images(
                config.data_dir, config.split, local_cache=copies, options=config.image_options
            )
            step.result = f"{len(opened):,} images, {opened.num_classes:,} classes"
        images = None
        if plan is not None:  # in the order of the cache
            images = opened.with_fingerprint(plan.identity.data.fingerprint, config.limit)
        images = images or opened.limited(config.limit)
        shard_size = config.shard_size or default_shard_size(len(images))
        check_shards(config.shards, -(-len(images) // shard_size))
        policy = ViewPolicy.parse(config.aug, interpolation=config.interpolation)
        precision = config.precision
        if precision == "auto":
            precision = plan.identity.precision if plan else auto_precision(device)
        with doing("loading the teacher"):
            teacher = (teacher or load_teacher(config.teacher)).to(device)
        no_tail = ""
        if config.stages and not teacher.has_tail:
            no_tail = f"{teacher.spec.model} has no tail: students learn from it with tpp=false"
        if config.torchcompile:
            teacher.compile(backend=config.torchcompile)
        logits, note = choose_logits(config.logits, teacher)
        classes = classes_of_data(opened.location, opened.class_names, opened.labels)
        match, unmatched = None, ""
        if logits != "none":
            match, unmatched = match_labels(classes, teacher, config.class_map, config.output, plan)
        notes = (*images.notes, no_tail, note, unmatched)
        return cls(
            drawn=DrawnViews(
                images,
                policy,
                config.seed,
                teacher.spec.img_size,
                skip_corrupt=config.skip_corrupt,
                embed=config.embed,
            ),
            teacher=teacher,
            request=Request(
                stages=list(config.stages), logits=logits, codec=str(parse_codec(config.codec))
            ),
            precision=precision,
            batch_size=config.batch_size,
            shard_size=shard_size,
            block_size=config.block_size or default_block_size(shard_size),
            form=config.form,
            workers=config.workers,
            compiler=config.torchcompile,
            match=match,
            class_map=stored_map(config.class_map, match),
            class_names=config.teacher.class_names,
            notes=tuple(filter(None, notes)),
        )

    @classmethod
    def of(
        cls,
        identity: Identity,
        form: Form,
        sources: CacheSources,
        *,
        drawn: DrawnViews | None = None,
        teacher: Teacher | None = None,
    ) -> Self:
        """Make the job that wrote a cache, the teacher on the CPU.

        Args:
            identity: Identity of the cache.
            form: Form of the cache.
            sources: Where its images and its teacher are.
            drawn: Its views, when they were opened before.
            teacher: Its teacher, when it was loaded before; or another, for other targets.

        Raises:
            ScaleKDError: Images or teacher cannot be opened, or are others than those of the cache.
        """
        if drawn is None:
            images = select_images(sources, open_source(sources), identity.data)
            drawn = views_of(identity, form, images)
        return cls(
            drawn=drawn,
            teacher=teacher
            or load_cached_teacher(sources, TeacherSpec.model_validate(identity.teacher)),
            request=Request.model_validate(identity.request),
            precision=identity.precision,
            batch_size=identity.batch_size,
            shard_size=identity.shard_size,
            block_size=identity.block_size,
            form=form,
            workers=default_num_workers() if sources.workers is None else sources.workers,
            class_map=identity.class_map,
        )

    def matched(self, classes: Classes, class_map: str, plan: Plan | None, output: object) -> Self:
        """Make the same job with the labels matched to the teacher's classes.

        Args:
            classes: Classes of the whole image set.
            class_map: As for ``cache-teacher``.
            plan: Plan of the cache to go on with; ``None`` for a new one.
            output: Where that is, for messages.

        Raises:
            DataError, UsageError, CacheMismatch: As for :func:`match_labels`.
        """
        if self.request.logits == "none":
            return replace(self, match=None, class_map=None)
        match, note = match_labels(classes, self.teacher, class_map, output, plan)
        notes = (*self.notes, note) if note else self.notes
        return replace(self, match=match, class_map=stored_map(class_map, match), notes=notes)

    def to(self, device: torch.device) -> Self:
        """Move the teacher to a device."""
        self.teacher.to(device)
        return self

    @property
    def images(self) -> ImageDataset:
        return self.drawn.images

    @property
    def keeps_targets(self) -> bool:
        """Whether anything of the teacher's output is kept."""
        return bool(self.request.stages) or self.request.logits != "none"

    def computed(self, encoder: EncoderName | None = None) -> dict[str, str] | None:
        """How this machine computes the targets; ``None`` where only views are kept.

        Args:
            encoder: Who encodes features; what suits the teacher's device when ``None``.
        """
        if not self.keeps_targets:
            return None
        device = self.teacher.device
        return compute_environment(device, encoder or default_encoder(device), self.compiler)

    def identity(self, tables: Tables) -> Identity:
        """The identity of the cache that this job writes with ``tables``."""
        drawn, images = self.drawn, self.images
        return Identity(
            teacher=self.teacher.spec.model_dump(mode="json"),
            precision=self.precision,
            batch_size=self.batch_size,
            request=self.request.model_dump(),
            stages=tables.stages,
            logits=tables.logits,
            tail=tables.tail[0],
            tail_digest=tables.tail[1],
            views=ViewsInfo(
                policy=drawn.policy.to_config(),
                view_size=drawn.view_size,
                seed=drawn.seed,
                environment=tables.environment,
                witnesses=tables.witnesses[0],
                witnesses_digest=tables.witnesses[1],
            ),
            data=DataInfo(
                fingerprint=images.fingerprint,
                num_samples=len(images),
                max_key_bytes=images.keys.dtype.itemsize,
                class_names=images.class_names,
            ),
            skip_corrupt=drawn.skip_corrupt,
            shard_size=self.shard_size,
            block_size=self.block_size,
            class_map=self.class_map,
        )

    def check(self, plan: Plan, output: object) -> None:
        """Raise ``CacheMismatch`` unless this job goes on with the cache at ``output``.

        Versions of libraries are not compared (:func:`check_pixels` draws views instead), nor the
        name by which the teacher's weights were found, nor the classes (:func:`match_labels`).
        """
        committed = plan.identity.model_copy(update={"class_map": None})
        own = replace(self, class_map=None).identity(Tables.of(committed))
        if own.teacher["weights_sha256"] == committed.teacher["weights_sha256"]:
            teacher = {n: v for n, v in own.teacher.items() if n not in ABOUT_ORIGIN}
            origin = {n: v for n, v in committed.teacher.items() if n in ABOUT_ORIGIN}
            own = own.model_copy(update={"teacher": teacher | origin})
        if own != committed:
            raise CacheMismatch(
                f"{output} was begun for something else: {differences(committed, own)}."
                " Give the same options to finish it, choose another --output, or pass --overwrite"
            )
        names = self.class_names
        if names is not None and list(names) != committed.teacher.get("class_names"):
            raise CacheMismatch(
                f"--teacher-classes: {output} was begun with other names of the teacher's"
                " classes; leave the option out, choose another --output, or pass --overwrite"
            )


def views_of(identity: Identity, form: Form, images: ImageDataset) -> DrawnViews:
    """The views of a cache, drawn from ``images``, and what of the images it embeds."""
    views = identity.views
    return DrawnViews(
        images,
        ViewPolicy.from_config(views.policy),
        views.seed,
        views.view_size,
        skip_corrupt=identity.skip_corrupt,
        embed=form.embed,
    )
