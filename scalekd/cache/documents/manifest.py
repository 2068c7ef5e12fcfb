"""The documents of a cache: plan, commit records of its shards, manifest.

``plan.json`` is written before the first shard and never changes. Its *identity* is everything
that decides the bytes of a shard. Every commit record contains the hash of the identity,
``cache_id``, so that a shard of another cache is recognised even if its shapes are the same.
``manifest.json`` is written last; a cache with a manifest is complete. It contains no date and no
machine name: the same job gives the same manifest.
"""

import hashlib
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, field_validator, model_validator

from scalekd.cache.documents import (
    FORMAT,
    FORMAT_VERSION,
    OMIT_DEFAULT,
    CacheDocument,
    canonical,
)
from scalekd.cache.documents.paths import (
    CodecTablesPath,
    DataPath,
    DocumentPath,
    RecordPath,
    TailPath,
    WitnessesPath,
)
from scalekd.cache.documents.plausible import check_identity
from scalekd.cache.files import FileDigest
from scalekd.codecs.measure import FeatureErrors
from scalekd.shapes import FeatureShape
from scalekd.teachers import TeacherSpec

_MAX_SAMPLES = 1 << 40
_MAX_SHARDS = 1 << 20
_MAX_PASSES = 10_000  # four digits in the names of folders
_MAX_BLOCK_VIEWS = 1 << 16
_MAX_SHARD_BLOCKS = 1 << 16
_MAX_BLOCK_BYTES = 2**31 - 1
_MAX_VIEW_SIDE = 1 << 12

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CodecInfo(CacheDocument):
    """A codec's JSON configuration, and the file of its tables if it has tables."""

    config: dict[str, Any]
    tables: CodecTablesPath | None = None
    tables_digest: FileDigest | None = None

    @model_validator(mode="after")
    def _check_tables_digest(self) -> Self:
        if (self.tables is None) != (self.tables_digest is None):
            raise ValueError("tables and tables_digest are given together or not at all")
        return self


class StageInfo(CacheDocument):
    """Features of one stage: their shape for one view, and their codec."""

    grid: tuple[int, int]
    num_channels: int = Field(ge=1, le=1 << 16)
    num_prefix_tokens: int = Field(ge=0, le=1 << 10)
    codec: CodecInfo

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if not all(1 <= side <= 1 << 10 for side in self.grid):
            raise ValueError(f"a token grid of {self.grid} is outside 1 to 1,024")
        return self

    @property
    def shape(self) -> FeatureShape:
        return FeatureShape(self.grid, self.num_channels, self.num_prefix_tokens)


class DataInfo(CacheDocument):
    """Description of the image set: size, fingerprint and class names."""

    fingerprint: Sha256
    num_samples: int = Field(ge=1, le=_MAX_SAMPLES)
    max_key_bytes: int = Field(ge=1, le=4096)
    class_names: tuple[str, ...] | None = None


class ViewsInfo(CacheDocument):
    """How views are drawn, and their size in pixels."""

    policy: dict[str, Any]
    view_size: tuple[int, int]
    seed: int = Field(ge=0, lt=1 << 63)
    environment: dict[str, str]
    witnesses: WitnessesPath
    witnesses_digest: FileDigest

    @model_validator(mode="after")
    def _check_view_size(self) -> Self:
        if not all(1 <= side <= _MAX_VIEW_SIDE for side in self.view_size):
            raise ValueError(
                f"a view of {self.view_size} pixels is outside 1 to {_MAX_VIEW_SIDE:,}"
            )
        return self


ClassMap = (
    Literal["number"]
    | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=1 << 20)]
)
"""The teacher's class of each label, if the two are numbered differently. ``"number"``: the user
declared that labels are the numbers of the teacher's classes."""


class Request(CacheDocument):
    """Requested stages, logits and codec, in the syntax of the options of stage one."""

    stages: list[Literal[3, 4]]
    logits: str
    codec: str


class Identity(CacheDocument):
    """Everything that the bytes of a shard depend on, other than rounding."""

    format: Literal["scalekd-cache"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    teacher: dict[str, Any]
    precision: Literal["fp32", "bf16", "fp16"]
    batch_size: int = Field(ge=1, le=1 << 20)
    request: dict[str, Any]
    stages: dict[Literal["3", "4"], StageInfo]
    logits: CodecInfo | None
    tail: TailPath | None
    tail_digest: FileDigest | None
    views: ViewsInfo
    data: DataInfo
    skip_corrupt: bool
    shard_size: int = Field(ge=1, le=1 << 24)
    block_size: int = Field(ge=1, le=_MAX_BLOCK_VIEWS)
    class_map: Annotated[ClassMap | None, OMIT_DEFAULT] = None

    @model_validator(mode="after")
    def _check_class_map(self) -> Self:
        if isinstance(self.class_map, tuple):
            num_classes = self.teacher.get("num_classes") or 0
            if len(set(self.class_map)) != len(self.class_map) or (
                max(self.class_map, default=0) >= num_classes
            ):
                raise ValueError(
                    f"class_map repeats a class or names one beyond the teacher's {num_classes:,}"
                )
            names = self.data.class_names
            if names is not None and len(names) != len(self.class_map):
                raise ValueError(
                    f"class_map has {len(self.class_map):,} entries for {len(names):,} classes"
                )
        return self

    @field_validator("teacher")
    @classmethod
    def _check_teacher(cls, value: dict[str, Any]) -> dict[str, Any]:
        TeacherSpec.model_validate(value)  # kept as JSON, so that its bytes stay the same
        return value

    @field_validator("request")
    @classmethod
    def _check_request(cls, value: dict[str, Any]) -> dict[str, Any]:
        Request.model_validate(value, strict=True)
        return value

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        """Refuse sizes beyond any real cache's, for which no machine has the memory."""
        if self.shard_size % self.block_size:
            raise ValueError(
                f"a shard of {self.shard_size} views is not whole blocks of {self.block_size}"
            )
        if self.num_shards > _MAX_SHARDS:
            raise ValueError(f"{self.num_shards:,} shards are more than {_MAX_SHARDS:,}")
        if self.shard_size // self.block_size > _MAX_SHARD_BLOCKS:
            raise ValueError(f"a shard has more than {_MAX_SHARD_BLOCKS:,} blocks")
        for stage, info in self.stages.items():
            size = 2 * self.block_size * info.shape.num_tokens * info.num_channels
            if size > _MAX_BLOCK_BYTES:
                raise ValueError(
                    f"a block of stage {stage} has {size:,} bytes in half precision, more than"
                    f" {_MAX_BLOCK_BYTES:,}"
                )
        return self

    @property
    def num_shards(self) -> int:
        return -(-self.data.num_samples // self.shard_size)

    def rows_of(self, shard: int) -> int:
        """Return the number of samples of a shard; it has fewer views if some were skipped."""
        return min(self.shard_size, self.data.num_samples - shard * self.shard_size)


_ERRORS_BY_STAGE = TypeAdapter(dict[Literal["3", "4"], FeatureErrors])

Computing = Annotated[
    dict[Name, Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=32)
]
"""What the rounding of targets depends on: device, versions, encoder; see docs/cache-format.md."""


class Provenance(CacheDocument):
    """Information that is not part of the identity, such as versions, licence and a note.

    Attributes:
        computed: How targets are computed, except for shards whose records differ.
        software: Library versions, by name.
        licence: Licence of the teacher's weights.
        note: Note of the cache's author.
        measured: The codec's errors on views not used for its calibration, by stage.
        num_passes: Number of passes that a budget chose; ``None`` if it was given.
    """

    computed: Annotated[Computing | None, OMIT_DEFAULT] = None
    software: dict[str, str]
    licence: str | None = None
    note: str | None = None
    num_passes: Annotated[int | None, Field(ge=1, le=_MAX_PASSES), OMIT_DEFAULT] = None
    measured: dict[str, Any] = Field(default_factory=dict)

    @field_validator("measured")
    @classmethod
    def _check_measured(cls, value: dict[str, Any]) -> dict[str, Any]:
        _ERRORS_BY_STAGE.validate_python(value, strict=True)
        return value


class Plan(CacheDocument):
    """Content of ``plan.json``."""

    cache_id: Sha256
    identity: Identity
    provenance: Provenance

    @classmethod
    def of(cls, identity: Identity, provenance: Provenance) -> Self:
        return cls(cache_id=_identity_hash(identity), identity=identity, provenance=provenance)

    @model_validator(mode="after")
    def _check(self) -> Self:
        # Not a check of `Identity`: options are turned into one to compare them with a cache's.
        check_identity(self.identity)
        if self.cache_id != _identity_hash(self.identity):
            raise ValueError("cache_id is not the hash of the identity: the plan was edited")
        return self


class ShardRecord(CacheDocument):
    """Commit record of one shard of a pass, or of one shard of the samples.

    Attributes:
        cache_id: Identifier of the cache that the shard belongs to.
        unit: ``"samples"`` or the number of the pass.
        shard: Number of the shard.
        num_rows: Number of valid rows; rows after them are padding.
        samples_sha256: Hash of keys, labels and images of the shard, in order; equal in all passes.
        files: Digest of every file of the shard, by path inside the cache.
        skipped: Keys of corrupt images that were skipped, if skipping was requested.
        computed: How the targets were computed, if it differs from the plan.
    """

    cache_id: Sha256
    unit: Literal["samples"] | Annotated[int, Field(ge=0, lt=_MAX_PASSES)]
    shard: int = Field(ge=0)
    num_rows: int = Field(ge=0)
    samples_sha256: Sha256
    files: dict[DataPath, FileDigest]
    skipped: tuple[str, ...] = ()
    computed: Annotated[Computing | None, OMIT_DEFAULT] = None


class Manifest(CacheDocument):
    """Content of ``manifest.json``."""

    plan: Plan
    num_passes: int = Field(ge=1, le=_MAX_PASSES)
    num_views: int = Field(ge=0)
    skipped: tuple[str, ...]
    files: dict[DocumentPath, FileDigest]
    records: dict[RecordPath, Sha256]
    total_bytes: int = Field(ge=0)
    computed_otherwise: Annotated[
        tuple[Computing, ...], Field(max_length=1 << 16), OMIT_DEFAULT
    ] = ()
    digest: Sha256 | Literal[""] = ""

    @property
    def fixed_bytes(self) -> int:
        """Size of tail, witnesses, codec tables and metadata, whatever the number of views."""
        return sum(entry.num_bytes for entry in self.files.values())

    @property
    def bytes_per_view(self) -> float:
        """Average size of a view in the files of the shards."""
        return max(0, self.total_bytes - self.fixed_bytes) / max(1, self.num_views)

    def sealed(self) -> Self:
        """Return the manifest with its own digest."""
        return self.model_copy(update={"digest": self._own_digest()})

    def _own_digest(self) -> str:
        return hashlib.sha256(canonical(self.model_copy(update={"digest": ""}))).hexdigest()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.digest and self.digest != self._own_digest():
            raise ValueError("its digest does not match its content: it was edited or damaged")
        # The number of records limits every loop over the shards of a cache.
        expected = self.plan.identity.num_shards * (self.num_passes + 1)
        if len(self.records) != expected:
            raise ValueError(f"it names {len(self.records):,} records where there are {expected:,}")
        return self


def _identity_hash(identity: Identity) -> str:
    return hashlib.sha256(canonical(identity)).hexdigest()
