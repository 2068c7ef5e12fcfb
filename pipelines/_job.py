"""``Job``: everything that decides the bytes of a cache, made from options or from a cache."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from scalekd.cache.cache import Cache
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
from scalekd.cache.forms import Form, form_named
from scalekd.cache.writing.planning import differences
from scalekd.codecs import parse_codec
from scalekd.errors import CacheMismatch
from scalekd.images import ImageDataset
from scalekd.loading.drawing import DrawnViews
from scalekd.models.classes import ClassMatch, classes_of_data
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
from scalekd.pipelines._sources import (
    index_images,
    load_cached_teacher,
    open_source,
    select_images,
)
from scalekd.pipelines._teacher_stream import EncoderName, default_encoder
from scalekd.storage import Storage, open_storage
from scalekd.teachers import (
    ABOUT_ORIGIN,
    Teacher,
    TeacherSpec,
    load_teacher,
)
from scalekd.views import ViewPolicy, pixel_environment


@dataclass(frozen=True)
class Tables:
    """Files that calibration writes, as the plan of a cache names them.

    Attributes:
        stages: Codec of each stage whose features are kept.
        logits: Codec of the logits; ``None`` if they are not kept.
        tail: Path and digest of the teacher's tail; ``(None, None)`` if it is not kept.
        witnesses: Path and digest of the witness views' pixels.
        environment: Versions of the libraries that drew the first views.
        measured: Errors of each stage's codec on views held out of its fit; not part of the
            identity of the cache.
    """

    stages: dict[Literal["3", "4"], StageInfo]
    logits: CodecInfo | None
    tail: tuple[str, FileDigest] | tuple[None, None]
    witnesses: tuple[str, FileDigest]
    environment: dict[str, str] = field(default_factory=pixel_environment)
    measured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, identity: Identity) -> Self:
        """Return the tables that an existing cache names."""
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
    """A cache to write: its views, its teacher, the targets it keeps, its form and its location.

    Attributes:
        output: Storage at the location of the cache.
        form: Form of the cache.
        drawn: Draws the views: images, policy, seed, size, and which images the cache embeds.
        teacher: Teacher that computes the targets.
        request: Targets to keep.
        precision: Precision of the teacher's arithmetic.
        batch_size: Number of views in a forward pass; it decides rounding.
        shard_size: Number of views in a shard.
        block_size: Number of views in a block.
        workers: Number of processes that draw views.
        compiler: Backend of ``torch.compile``, if the teacher is compiled.
        match: The teacher's class of each label; ``None`` if labels are not compared.
        class_map: Form of ``match`` that the plan of a new cache keeps.
        class_names: Names of the teacher's classes, if the options give them.
        notes: Lines to print before the job begins.
    """

    output: Storage
    form: Form
    drawn: DrawnViews
    teacher: Teacher
    request: Request
    precision: Literal["fp32", "bf16", "fp16"]
    batch_size: int
    shard_size: int
    block_size: int
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
        """Make the job that a configuration describes.

        Args:
            config: Options of ``scalekd cache-teacher``.
            device: Device of the teacher; it decides what ``--precision auto`` means.
            teacher: Teacher to use instead of the one that ``config.teacher`` names.

        Raises:
            ScaleKDError: Any fault that can be detected before the teacher runs.
        """
        check_options(config, named=teacher is None)
        policy = ViewPolicy.parse(config.aug, interpolation=config.interpolation)
        codec = parse_codec(config.codec)
        form = form_named(config.format, config.embed)
        output = open_storage(config.output)
        plan = check_output(output, form, overwrite=config.overwrite)
        opened = index_images(config.data_dir, config)
        images = None
        if plan is not None:  # in the order of the existing cache
            images = opened.with_fingerprint(plan.identity.data.fingerprint, config.limit)
        images = images or opened.limited(config.limit)
        shard_size = config.shard_size or default_shard_size(len(images))
        check_shards(config.shards, -(-len(images) // shard_size))
        precision = config.precision
        if precision == "auto":
            precision = plan.identity.precision if plan else auto_precision(device)
        with doing("loading the teacher"):
            teacher = (teacher or load_teacher(config.teacher)).to(device)
        if config.torchcompile:
            teacher.compile(backend=config.torchcompile)
        no_tail = ""
        if config.stages and not teacher.has_tail:
            no_tail = f"{teacher.spec.model} has no tail: students learn from it with tpp=false"
        logits, no_logits = choose_logits(config.logits, teacher, stages=config.stages)
        job = cls(
            output=output,
            form=form,
            drawn=DrawnViews(
                images,
                policy,
                config.seed,
                teacher.spec.img_size,
                skip_corrupt=config.skip_corrupt,
                embed=config.embed,
            ),
            teacher=teacher,
            request=Request(stages=list(config.stages), logits=logits, codec=str(codec)),
            precision=precision,
            batch_size=config.batch_size,
            shard_size=shard_size,
            block_size=config.block_size or default_block_size(shard_size),
            workers=config.workers,
            compiler=config.torchcompile,
            class_names=config.teacher.class_names,
            notes=tuple(filter(None, (*images.notes, no_tail, no_logits))),
        )
        return job.matched(opened, config.class_map, plan)

    @classmethod
    def of(
        cls,
        cache: Cache,
        sources: CacheSources,
        *,
        drawn: DrawnViews | None = None,
        teacher: Teacher | None = None,
    ) -> Self:
        """Make the job that wrote a cache, with the teacher on the CPU.

        Args:
            cache: The cache.
            sources: Where its images and its teacher are.
            drawn: Its views, if they were opened before.
            teacher: Its teacher, if it was loaded before; or another one, for other targets.

        Raises:
            ScaleKDError: Images or teacher cannot be opened, or are not those of the cache.
        """
        identity = cache.identity
        if drawn is None:
            drawn = views_of(cache, select_images(sources, open_source(sources), identity.data))
        if teacher is None:
            teacher = load_cached_teacher(sources, TeacherSpec.model_validate(identity.teacher))
        return cls(
            output=cache.storage,
            form=cache.form,
            drawn=drawn,
            teacher=teacher,
            request=Request.model_validate(identity.request),
            precision=identity.precision,
            batch_size=identity.batch_size,
            shard_size=identity.shard_size,
            block_size=identity.block_size,
            workers=default_num_workers() if sources.workers is None else sources.workers,
            class_map=identity.class_map,
        )

    def matched(self, opened: ImageDataset, class_map: str, plan: Plan | None) -> Self:
        """Make the same job with the labels matched to the teacher's classes.

        Args:
            opened: The whole image set, whose classes the labels are.
            class_map: Value of ``--class-map``.
            plan: Plan of the existing cache; ``None`` for a new one.

        Raises:
            DataError, UsageError, CacheMismatch: See :func:`match_labels`.
        """
        if self.request.logits == "none":
            return replace(self, match=None, class_map=None)
        classes = classes_of_data(opened.location, opened.class_names, opened.labels)
        match, note = match_labels(classes, self.teacher, class_map, self.output.location, plan)
        notes = (*self.notes, note) if note else self.notes
        return replace(self, match=match, class_map=stored_map(class_map, match), notes=notes)

    def to(self, device: torch.device) -> Self:
        """Move the teacher to a device."""
        self.teacher.to(device)
        return self

    @property
    def images(self) -> ImageDataset:
        """Images of the cache, in its order."""
        return self.drawn.images

    @property
    def keeps_targets(self) -> bool:
        """Whether the cache keeps features or logits of the teacher."""
        return bool(self.request.stages) or self.request.logits != "none"

    def computed(self, encoder: EncoderName | None = None) -> dict[str, str] | None:
        """Describe how this machine computes the targets; ``None`` if the cache keeps none.

        Args:
            encoder: Implementation that encodes features; the default of the device when ``None``.
        """
        if not self.keeps_targets:
            return None
        device = self.teacher.device
        return compute_environment(device, encoder or default_encoder(device), self.compiler)

    def identity(self, tables: Tables) -> Identity:
        """Return the identity of the cache that this job writes with ``tables``."""
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

    def check(self, plan: Plan) -> None:
        """Check that this job continues the cache at ``output``, whose plan is ``plan``.

        Three things are not compared: versions of libraries (:func:`check_pixels` draws views
        again), the name under which the teacher's weights were read, and the classes of the labels
        (:func:`match_labels`).

        Raises:
            CacheMismatch: The cache was begun with other options, images or weights.
        """
        committed = plan.identity.model_copy(update={"class_map": None})
        own = replace(self, class_map=None).identity(Tables.of(committed))
        if own.teacher["weights_sha256"] == committed.teacher["weights_sha256"]:
            teacher = {n: v for n, v in own.teacher.items() if n not in ABOUT_ORIGIN}
            origin = {n: v for n, v in committed.teacher.items() if n in ABOUT_ORIGIN}
            own = own.model_copy(update={"teacher": teacher | origin})
        if own != committed:
            raise CacheMismatch(
                f"{self.output.location} was begun for something else:"
                f" {differences(committed, own)}. Give the same options to finish it, choose"
                " another --output, or pass --overwrite"
            )
        names = self.class_names
        if names is not None and list(names) != committed.teacher.get("class_names"):
            raise CacheMismatch(
                f"--teacher-classes: {self.output.location} was begun with other names of the"
                " teacher's classes; leave the option out, choose another --output, or pass"
                " --overwrite"
            )


def views_of(cache: Cache, images: ImageDataset) -> DrawnViews:
    """Describe how the views of a cache are drawn from ``images``, and which images it embeds."""
    identity = cache.identity
    return DrawnViews(
        images,
        ViewPolicy.from_config(identity.views.policy),
        identity.views.seed,
        identity.views.view_size,
        skip_corrupt=identity.skip_corrupt,
        embed=cache.form.embed,
    )
