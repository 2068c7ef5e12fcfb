"""``Cache``: the object that represents a cache at a location, complete or still growing.

Reading, writing, transfer, verification and repair take a :class:`Cache`; it reads the cache's
documents in one way, and knows the files of every shard.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Self

from scalekd.cache.codecs import CacheCodecs, make_layout, outline
from scalekd.cache.documents.manifest import Manifest, Plan, ShardRecord
from scalekd.cache.documents.selection import Selection, check_owner, read_selection
from scalekd.cache.documents.stored import read_document, read_document_if_any
from scalekd.cache.files import FileDigest, holds
from scalekd.cache.forms import Form, read_form
from scalekd.cache.forms.store import unit_documents
from scalekd.cache.forms.webdataset.form import INFO_FILE
from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE, SAMPLES, Layout, ShardId, Unit
from scalekd.cache.tables import table_files
from scalekd.cache.writing.planning import begin_form, commit_plan, read_plan
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError
from scalekd.storage import Location, Storage, open_storage

_IN_FLIGHT = 8  # requests to a remote store at once


class Cache:
    """A cache at a location.

    Form, codecs, layout and selection are read when they are first needed, and once.

    Args:
        location: Folder, URL or opened storage.
        plan: Plan of the cache, which its documents must agree with.
        codecs: Codecs, if they are known already, such as those of another location.
        form: Form, if it is known already.

    Attributes:
        storage: The files at the location.
        location: Location of the cache, for messages.
        plan: Plan of the cache.
        identity: Identity of the cache: everything that decides its bytes.
    """

    def __init__(
        self,
        location: Location,
        plan: Plan,
        *,
        codecs: CacheCodecs | None = None,
        form: Form | None = None,
    ) -> None:
        self.storage: Storage = open_storage(location)
        self.location = self.storage.location
        self.plan = plan
        self.identity = plan.identity
        self._codecs = codecs
        self._form = form

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
        """Write form and plan, unless another process has written them; its plan is then used.

        Raises:
            CacheMismatch: The cache was begun in another form.
        """
        storage = open_storage(location)
        begin_form(storage, form)
        return cls(storage, commit_plan(storage, plan))

    @cached_property
    def form(self) -> Form:
        """Form in which the passes are stored.

        Raises:
            CacheCorrupt, CacheMismatch: Its document is damaged or of another version.
        """
        return self._form or read_form(self.storage)

    @cached_property
    def codecs(self) -> CacheCodecs:
        """Codecs of stages and logits; reads their tables."""
        return self._codecs or CacheCodecs.load(self.storage, self.identity)

    @cached_property
    def layout(self) -> Layout:
        """Arrays of the cache; reads the codecs, because fitted tables decide the size of some."""
        return make_layout(self.identity, self.codecs.planes, self.form)

    @cached_property
    def _outline(self) -> Layout:
        """The layout without the sizes that depend on codec tables; enough for file names."""
        return make_layout(self.identity, outline(self.identity), self.form)

    @cached_property
    def selection(self) -> Selection:
        """Part of the cache that is at the location; all of it if no selection was written.

        Raises:
            CacheCorrupt: The selection is damaged.
            CacheMismatch: The selection belongs to another cache.
        """
        selection = read_selection(self.storage)
        check_owner(self.storage, selection, self.plan.cache_id)
        return selection or Selection(cache_id=self.plan.cache_id)

    def manifest(self) -> Manifest | None:
        """Read the manifest; ``None`` until the first pass is complete.

        Raises:
            CacheCorrupt: The manifest is damaged.
            CacheMismatch: It belongs to another cache, or another version of the format wrote it.
        """
        manifest = read_manifest_if_any(self.storage)
        if manifest is not None and manifest.plan.cache_id != self.plan.cache_id:
            raise CacheMismatch(
                f"{self.storage.locate(MANIFEST_FILE)}: belongs to cache"
                f" {manifest.plan.cache_id[:12]}…, and the plan to cache"
                f" {self.plan.cache_id[:12]}…: files of two caches were mixed"
            )
        return manifest

    def shards(self, num_passes: int) -> Iterator[ShardId]:
        """Yield every shard of the samples and of the first passes, in order."""
        units: tuple[Unit, ...] = (SAMPLES, *range(num_passes))
        for unit in units:
            for number in range(self.identity.num_shards):
                yield ShardId(unit, number)

    def has(self, shard: ShardId) -> bool:
        """Return whether a shard is committed."""
        return self.storage.exists(shard.record_path)

    def missing(self, shards: Iterable[ShardId]) -> list[ShardId]:
        """Return the shards without a commit record, in order."""
        wanted = list(shards)
        if not self.storage.is_remote:
            return [shard for shard in wanted if not self.has(shard)]
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="cache-missing") as threads:
            committed = list(threads.map(self.has, wanted))
        return [shard for shard, has in zip(wanted, committed, strict=True) if not has]

    def record(self, shard: ShardId, *, sha256: str | None = None) -> ShardRecord:
        """Read a commit record, and check that it is the record of this shard of this cache.

        Args:
            shard: The shard.
            sha256: SHA-256 of the record's file if known, under which a local cache may have a
                copy; it is not checked here.

        Raises:
            CacheCorrupt: Missing, damaged, swapped, or naming other files than the layout's.
            CacheMismatch: It belongs to another cache.
        """
        path, plan = self.storage.locate(shard.record_path), self.plan
        record = read_document(
            self.storage, shard.record_path, ShardRecord, "a commit record", sha256=sha256
        )
        if record.cache_id != plan.cache_id:
            raise CacheMismatch(
                f"{path}: the shard belongs to cache {record.cache_id[:12]}…, and the plan to cache"
                f" {plan.cache_id[:12]}…"
            )
        if ShardId(record.unit, record.shard) != shard:
            raise CacheCorrupt(
                f"{path}: contains the record of {record.unit!r}, shard {record.shard}: files were"
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
        """Return the paths of a shard's files.

        Args:
            shard: The shard.
            num_rows: Number of views in the shard; as if no image had been skipped when ``None``.
        """
        count = self.identity.rows_of(shard.number) if num_rows is None else num_rows
        return self._outline.unit_files(shard.unit, shard.number, count)

    def documents(self, unit: Unit) -> dict[str, bytes]:
        """Return the documents that describe how arrays are stored, by path; reads the codecs."""
        return unit_documents(self.layout, unit)

    def check_names(self, manifest: Manifest) -> None:
        """Check that a manifest names only files of this cache.

        Raises:
            CacheCorrupt: It names another file, or gives a table another digest than the plan.
        """
        tables = table_files(self.identity)
        known = {PLAN_FILE, INFO_FILE, *tables, *self.form.documents()}
        units: tuple[Unit, ...] = (SAMPLES, *range(manifest.num_passes))
        for unit in units:
            known.update(unit_documents(self._outline, unit))  # the names alone
        for path, expected in manifest.files.items():
            if path not in known or tables.get(path, expected) != expected:
                raise CacheCorrupt(
                    f"{self.storage.locate(MANIFEST_FILE)}: {path} is not a file of the cache that"
                    " its plan describes"
                )

    def holds(self, path: str, expected: FileDigest | bytes) -> bool:
        """Return whether a file has the expected digest or bytes; reads the whole file."""
        return holds(self.storage, path, expected)


def read_manifest_if_any(storage: Storage) -> Manifest | None:
    """Read the manifest of a cache; ``None`` if it does not exist.

    Raises:
        CacheCorrupt: The manifest is damaged.
        CacheMismatch: Another version of the format wrote it.
    """
    manifest = read_document_if_any(storage, MANIFEST_FILE, Manifest, "the manifest")
    if manifest is not None and not manifest.digest:
        raise CacheCorrupt(
            f"{storage.locate(MANIFEST_FILE)}: contains no digest of its content: it was edited"
        )
    return manifest
