"""``Cache``: the object that represents a cache at a location, complete or still growing.

Reading, writing, transfer, verification and repair take a :class:`Cache`; it reads the cache's
documents in one way, and knows the files of every shard.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Self

from scalekd.cache.codecs import CacheCodecs
from scalekd.cache.documents import MAX_JSON_BYTES, parse_committed
from scalekd.cache.documents.manifest import Identity, Manifest, Plan, ShardRecord
from scalekd.cache.documents.selection import Selection, check_owner, read_selection
from scalekd.cache.files import FileDigest, holds, read_bounded
from scalekd.cache.forms import Form
from scalekd.cache.forms.store import unit_documents
from scalekd.cache.forms.webdataset.form import INFO_FILE
from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE, SAMPLES, Layout, ShardId, Unit
from scalekd.cache.tables import table_files
from scalekd.cache.writing.planning import begin_form, commit_plan, read_plan
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError
from scalekd.storage import Location, NotStored, Storage, StoredFileError, open_storage

_IN_FLIGHT = 8  # requests to a remote store at once


class Cache:
    """A cache at a location.

    Form, codecs, layout and selection are read when they are first needed, and once.

    Args:
        location: Folder, URL or opened storage.
        plan: Plan of the cache, which its documents must agree with.
        codecs: Codecs and form, where they are known already, such as those of another location.

    Attributes:
        storage: The files at the location.
        plan: Plan of the cache.
    """

    def __init__(
        self, location: Location, plan: Plan, *, codecs: CacheCodecs | None = None
    ) -> None:
        self.storage: Storage = open_storage(location)
        self.plan = plan
        self._codecs = codecs

    @classmethod
    def open(cls, location: Location) -> Self:
        """Open a cache that is complete or begun.

        Raises:
            DataError: The location does not contain a cache.
            CacheCorrupt, CacheMismatch: Its plan or manifest is damaged or of another version.
        """
        storage = open_storage(location)
        manifest = read_manifest_if_any(storage)
        plan = manifest.plan if manifest is not None else read_plan(storage)
        if plan is None:
            raise DataError(f"no cache at {storage.location}")
        return cls(storage, plan)

    @classmethod
    def begin(cls, location: Location, plan: Plan, form: Form) -> Self:
        """Write form and plan, unless another process was first; its plan is then in force.

        Raises:
            CacheMismatch: The cache was begun in another form.
        """
        storage = open_storage(location)
        begin_form(storage, form)
        return cls(storage, commit_plan(storage, plan))

    @property
    def location(self) -> str:
        """The location, for messages."""
        return self.storage.location

    @property
    def identity(self) -> Identity:
        """Everything that decides the bytes of the cache."""
        return self.plan.identity

    @property
    def form(self) -> Form:
        """How the passes are stored."""
        return self.codecs.form

    @cached_property
    def codecs(self) -> CacheCodecs:
        """Codecs of stages and logits; reads their tables."""
        return self._codecs or CacheCodecs.load(self.storage, self.identity)

    @cached_property
    def layout(self) -> Layout:
        """Arrays and files of the cache; reads the codecs."""
        return self.codecs.layout(self.identity)

    @cached_property
    def selection(self) -> Selection:
        """The part of the cache that is here; all of it where no selection was written.

        Raises:
            CacheCorrupt: The selection is damaged.
            CacheMismatch: It is of another cache.
        """
        selection = read_selection(self.storage)
        check_owner(self.storage, selection, self.plan.cache_id)
        return selection or Selection(cache_id=self.plan.cache_id)

    def manifest(self) -> Manifest | None:
        """Read the manifest; ``None`` until the first pass is complete.

        Raises:
            CacheCorrupt: It is damaged.
            CacheMismatch: It is of another cache, or of another version of the format.
        """
        manifest = read_manifest_if_any(self.storage)
        if manifest is not None and manifest.plan.cache_id != self.plan.cache_id:
            raise CacheMismatch(
                f"{self.storage.locate(MANIFEST_FILE)}: is of cache"
                f" {manifest.plan.cache_id[:12]}…, and the plan beside it of"
                f" {self.plan.cache_id[:12]}…: files of two caches were mixed"
            )
        return manifest

    def shards(self, num_passes: int) -> Iterator[ShardId]:
        """Every shard of the samples and of the first passes, in order."""
        units: tuple[Unit, ...] = (SAMPLES, *range(num_passes))
        for unit in units:
            for number in range(self.identity.num_shards):
                yield ShardId(unit, number)

    def has(self, shard: ShardId) -> bool:
        """Whether a shard is committed."""
        return self.storage.exists(shard.record_path)

    def missing(self, shards: Iterable[ShardId]) -> list[ShardId]:
        """Those without a commit record, in order; asks a remote store for several at once."""
        wanted = list(shards)
        if not self.storage.is_remote:
            return [shard for shard in wanted if not self.has(shard)]
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="cache-missing") as threads:
            there = list(threads.map(self.has, wanted))
        return [shard for shard, found in zip(wanted, there, strict=True) if not found]

    def record(self, shard: ShardId, *, sha256: str | None = None) -> ShardRecord:
        """Read a commit record, and check that it is the record of this shard of this cache.

        Args:
            shard: Which shard.
            sha256: Hash of the record's file where known; helps a local cache, and is not checked.

        Raises:
            CacheCorrupt: Missing, damaged, swapped, or naming other files than the layout's.
            CacheMismatch: It belongs to another cache.
        """
        path, plan = self.storage.locate(shard.record_path), self.plan
        data = read_bounded(
            self.storage,
            shard.record_path,
            max_bytes=MAX_JSON_BYTES,
            what="a commit record",
            sha256=sha256,
        )
        record = parse_committed(ShardRecord, data, where=path)
        if record.cache_id != plan.cache_id:
            raise CacheMismatch(
                f"{path}: this shard belongs to cache {record.cache_id[:12]}…, this is"
                f" {plan.cache_id[:12]}…"
            )
        if ShardId(record.unit, record.shard) != shard:
            raise CacheCorrupt(
                f"{path}: holds the record of {record.unit!r}, shard {record.shard}: files were"
                " swapped"
            )
        num_rows = self.identity.rows_of(shard.number)
        if record.num_rows + len(record.skipped) != num_rows:
            raise CacheCorrupt(
                f"{path}: {record.num_rows} rows and {len(record.skipped)} skipped samples do not"
                f" make the shard's {num_rows}"
            )
        expected = set(self.files(shard, record.num_rows))
        if set(record.files) != expected:
            odd = sorted(set(record.files) ^ expected)[0]
            raise CacheCorrupt(
                f"{path}: names other files than shard {shard.number} has, such as {odd!r}"
            )
        return record

    def files(self, shard: ShardId, num_rows: int | None = None) -> list[str]:
        """Paths of a shard's files, by default as if no image of it had been skipped."""
        count = self.identity.rows_of(shard.number) if num_rows is None else num_rows
        return self.layout.unit_files(shard.unit, shard.number, count)

    def documents(self, unit: Unit) -> dict[str, bytes]:
        """Documents that say how a unit's arrays are stored, by path."""
        return unit_documents(self.layout, unit)

    def check_names(self, manifest: Manifest) -> None:
        """Refuse a manifest with files that the plan does not give a cache.

        Raises:
            CacheCorrupt: It names another file than the layout, or gives a table another digest
                than the plan.
        """
        tables = table_files(self.identity)
        known = {PLAN_FILE, INFO_FILE, *tables, *self.layout.form.documents()}
        units: tuple[Unit, ...] = (SAMPLES, *range(manifest.num_passes))
        for unit in units:
            known.update(self.documents(unit))
        for path, expected in manifest.files.items():
            if path not in known or tables.get(path, expected) != expected:
                raise CacheCorrupt(
                    f"{self.storage.locate(MANIFEST_FILE)}: {path} is not a file that its plan"
                    " gives this cache"
                )

    def holds(self, path: str, expected: FileDigest | bytes) -> bool:
        """Whether a file has the very bytes that were committed; reads all of it."""
        return holds(self.storage, path, expected)


def read_manifest_if_any(storage: Storage) -> Manifest | None:
    """Read the manifest of a cache; ``None`` if it does not exist.

    Raises:
        CacheCorrupt: It is damaged.
        CacheMismatch: It was written in another version of the format.
    """
    path = storage.locate(MANIFEST_FILE)
    try:
        data = storage.read(MANIFEST_FILE, max_bytes=MAX_JSON_BYTES)
    except NotStored:
        return None
    except StoredFileError as error:
        raise CacheCorrupt(f"{path}: the manifest {error.problem}") from None
    manifest = parse_committed(Manifest, data, where=path)
    if not manifest.digest:
        raise CacheCorrupt(f"{path}: carries no digest of itself: it was edited")
    return manifest
