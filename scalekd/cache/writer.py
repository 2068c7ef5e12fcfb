"""Writing a cache: plan first, then shards in any order by any process, the manifest last.

A shard is written by one process, the one that holds its lease. Its files appear one by one, each
atomically, and count for nothing until the shard's commit record stands. A killed writer leaves
committed shards, whole files of at most one uncommitted shard, its leases, and temporary files; the
next run takes over and redoes that shard.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr

from scalekd.cache.files import FileDigest, digest, read_bounded
from scalekd.cache.layout import (
    EXTENSIONS_FOLDER,
    MANIFEST_FILE,
    PLAN_FILE,
    RECORDS_FOLDER,
    SAMPLES,
    SELECTION_FOLDER,
    TABLES_FOLDER,
    ArraySpec,
    Layout,
    Unit,
    array_path,
    record_path,
)
from scalekd.cache.lease import LeaseHolder, Leases, live_lease, remove_settled
from scalekd.cache.manifest import (
    MAX_JSON_BYTES,
    Identity,
    Manifest,
    Plan,
    ShardRecord,
    canonical,
    parse_committed,
)
from scalekd.cache.publish import all_recorded, remove_remote, send_files
from scalekd.cache.records import (
    has_record,
    read_record,
    record_hash,
    samples_hash,
    write_record,
)
from scalekd.cache.store import CommittingStore, open_array, unit_documents, write_rows
from scalekd.cache.webdataset.blocks import make_block
from scalekd.cache.webdataset.form import (
    FORM_FILE,
    INFO_FILE,
    WebDatasetForm,
    form_name,
    index_path,
    info_document,
    read_form,
    tar_path,
)
from scalekd.cache.webdataset.packing import SOURCE_HASH, ViewPacking
from scalekd.cache.webdataset.shard_file import TarShardFile
from scalekd.errors import CacheCorrupt, CacheMismatch, EnvironmentFault, UsageError
from scalekd.storage import LocalStorage, Place, Storage, open_storage
from scalekd.storage.files import TEMPORARY_SUFFIX, explained, inside

Rows = np.ndarray[Any, Any]

_POLL_SECONDS = 0.05  # of another process that commits the samples of a shard: a moment's work
_MAX_QUEUED_BLOCKS = 4  # bounds memory when coding falls behind the teacher

_EARLY_NAMES = frozenset({TABLES_FOLDER, FORM_FILE})
"""What stands at the top of a cache before its plan does."""

_NAMES = _EARLY_NAMES | {
    *(PLAN_FILE, MANIFEST_FILE, INFO_FILE, "zarr.json"),
    *(SAMPLES, "passes", RECORDS_FOLDER, EXTENSIONS_FOLDER, SELECTION_FOLDER),
}


def read_plan(place: Place) -> Plan | None:
    """The plan of the cache at ``place``, or ``None`` when no cache was begun there.

    Raises:
        UsageError: The folder holds something that is no cache.
    """
    storage = open_storage(place)
    if isinstance(storage, LocalStorage):
        if not storage.root.exists():
            return None
        if not storage.root.is_dir():
            raise UsageError(f"{storage.place} is a file; --output names the folder of a cache")
    if not storage.exists(PLAN_FILE):
        if isinstance(storage, LocalStorage):
            _refuse_strangers(storage.root, _EARLY_NAMES)
        return None
    data = read_bounded(storage, PLAN_FILE, max_bytes=MAX_JSON_BYTES, what="the plan")
    return parse_committed(Plan, data, where=storage.locate(PLAN_FILE))


def _refuse_strangers(root: Path, names: frozenset[str]) -> None:
    strangers = [
        entry.name
        for entry in root.iterdir()
        if entry.name not in names and not entry.name.endswith(TEMPORARY_SUFFIX)
    ]
    tables = root / TABLES_FOLDER
    if tables.is_dir():
        strangers += [
            f"{TABLES_FOLDER}/{entry.name}"
            for entry in tables.iterdir()
            if not entry.name.endswith((".safetensors", TEMPORARY_SUFFIX))
        ]
    if strangers:
        raise UsageError(
            f"{root} holds something that is no cache ({', '.join(sorted(strangers)[:3])}); choose"
            " an empty or new folder"
        )


def remove_cache(place: Place) -> None:
    """Delete a cache, whole, begun or damaged, and nothing but a cache.

    The plan goes last: a removal that was interrupted can be taken up again.

    Raises:
        UsageError: The folder holds something else, or another job writes it; nothing was deleted.
    """
    storage = open_storage(place)
    if not isinstance(storage, LocalStorage):
        remove_remote(storage, _NAMES)
        return
    root = storage.root
    if not root.exists():
        return
    if not root.is_dir() or not (root / PLAN_FILE).exists():
        read_plan(root)
    _refuse_strangers(root, _NAMES)
    holder = live_lease(root)
    if holder is not None:
        raise UsageError(
            f"--overwrite: {root} is being written by {holder}; stop that job first (if it died"
            " with its machine, its claim lapses three minutes later)"
        )
    with explained(root, "cannot remove"):
        (root / MANIFEST_FILE).unlink(missing_ok=True)
        for entry in sorted(root.iterdir(), key=lambda entry: entry.name == PLAN_FILE):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)


def begin_form(place: Place, form: WebDatasetForm | None) -> None:
    """Write the form of a new cache, before its plan, or make sure that a cache has this form.

    Raises:
        CacheMismatch: It was begun in another.
    """
    storage = open_storage(place)
    if form is not None and not storage.exists(PLAN_FILE):
        storage.commit(FORM_FILE, canonical(form), exclusive=True)
    check_form(storage, form)


def check_form(place: Place, form: WebDatasetForm | None) -> None:
    """Raise ``CacheMismatch`` if the cache was begun in another form."""
    storage = open_storage(place)
    standing = read_form(storage)
    if standing != form:
        raise CacheMismatch(
            f"{storage.place} was begun in {form_name(standing)}, not in {form_name(form)}; give"
            " the same --format and --embed to finish it, choose another --output, or --overwrite"
        )


def commit_plan(place: Place, plan: Plan) -> Plan:
    """Write the plan, unless another process was first.

    Returns:
        The plan in force. Machines that begin one cache at once may calibrate to other tables;
        they all go on with those of the first, if its job is theirs.
    """
    storage = open_storage(place)
    if storage.commit(PLAN_FILE, canonical(plan), exclusive=True):
        return plan
    standing = read_plan(storage)
    if standing is None:
        raise EnvironmentFault(
            f"{storage.locate(PLAN_FILE)} is there and cannot be seen: does the file system show"
            " other machines' files late? Run the same command again"
        )
    return standing


def begin(place: Place, plan: Plan, layout: Layout, num_passes: int) -> None:
    """Write the metadata of all arrays, and remove tables that the plan does not name."""
    storage = open_storage(place)
    if isinstance(storage, LocalStorage):
        wanted = set(table_files(plan.identity))
        for path in (storage.root / TABLES_FOLDER).glob("*.safetensors"):
            if f"{TABLES_FOLDER}/{path.name}" not in wanted:
                path.unlink(missing_ok=True)  # of a run that was killed before it wrote a plan
    for unit in (SAMPLES, *range(num_passes)):
        commit_documents(storage, unit_documents(layout, unit))


def commit_documents(storage: Storage, documents: Mapping[str, bytes]) -> None:
    """Write small files, but for those that stand there with the same content."""
    made = storage.commit_all(documents, exclusive=True) if storage.is_remote else set()
    changed = {}
    for relative in documents.keys() - made:
        content, size = documents[relative], storage.size(relative)
        if size != len(content) or storage.read(relative, max_bytes=size) != content:
            changed[relative] = content
    if changed:
        storage.commit_all(changed)


def table_files(identity: Identity) -> dict[str, FileDigest]:
    """Tail, witnesses and codec tables: the files that the plan itself names."""
    codecs = [stage.codec for stage in identity.stages.values()]
    pairs = [
        (identity.tail, identity.tail_digest),
        (identity.views.witnesses, identity.views.witnesses_digest),
        *((codec.tables, codec.tables_digest) for codec in codecs),
    ]
    return {path: found for path, found in pairs if path and found}


def differences(standing: Identity, wanted: Identity) -> str:
    """The fields in which two identities differ, as ``name: old in the cache, new wanted``."""
    found: list[str] = []

    def walk(place: str, old: Any, new: Any) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys()):
                walk(f"{place}.{key}" if place else key, old.get(key), new.get(key))
        elif old != new:
            found.append(f"{place} is {_short(old)} in the cache, {_short(new)} here")

    walk("", standing.model_dump(mode="json"), wanted.model_dump(mode="json"))
    return "; ".join(found[:4]) + ("; …" if len(found) > 4 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"


@dataclass(frozen=True)
class SampleRows:
    """What is stored of a shard's samples, row by row."""

    keys: tuple[str, ...]
    labels: Rows
    source_hashes: Rows

    def columns(self, max_key_bytes: int) -> dict[str, Rows]:
        keys = np.zeros((len(self.keys), max_key_bytes), np.uint8)
        for row, key in enumerate(self.keys):
            encoded = key.encode()
            keys[row, : len(encoded)] = np.frombuffer(encoded, np.uint8)
        return {
            "key": keys,
            "label": self.labels.astype(np.int32),
            "source_hash": self.source_hashes.astype(np.uint64),
        }


@dataclass(frozen=True)
class ViewRows:
    """What is stored of a block's views beside the teacher's targets, row by row.

    Attributes:
        samples: Whose views they are.
        columns: By array: how each view was drawn, and the hash of its pixels.
        images: Encoded, for a cache whose tars hold images.
    """

    samples: SampleRows
    columns: dict[str, Rows]
    images: tuple[bytes, ...] | None = None

    @staticmethod
    def joined(blocks: Sequence["ViewRows"]) -> "ViewRows":
        """The rows of several blocks, without their images."""
        samples = [block.samples for block in blocks]
        empty = SampleRows((), np.empty(0, np.int32), np.empty(0, np.uint64))
        return ViewRows(
            SampleRows(
                tuple(key for found in samples for key in found.keys),
                np.concatenate([empty.labels, *(found.labels for found in samples)]),
                np.concatenate([empty.source_hashes, *(found.source_hashes for found in samples)]),
            ),
            {
                name: np.concatenate([block.columns[name] for block in blocks])
                for name in (blocks[0].columns if blocks else ())
            },
        )


class ShardWriter:
    """Takes the rows of one shard in order, and commits them.

    Blocks are coded and written by a pool of threads beside the teacher.
    """

    def __init__(self, writer: "CacheWriter", unit: int, shard: int) -> None:
        self._writer = writer
        self._unit = unit
        self._shard = shard
        self._pending: deque[Future[None]] = deque()
        self._blocks: list[ViewRows] = []
        self._tar = writer.new_tar() if writer.layout.form else None
        self._next_row = shard * writer.layout.identity.shard_size
        if not writer.claim(unit, shard):
            holder = writer.busy.get((unit, shard))
            raise CacheMismatch(
                f"{writer.place.place}: shard {shard} of pass {unit} "
                + (f"is being written by {holder}" if holder else "is already committed")
                + "; a shard is written once"
            )
        writer.remove_debris(unit, shard)

    def write_block(self, encode: Callable[[], dict[str, Rows]], rows: ViewRows) -> None:
        """Queue the next block; waits while too many are queued.

        Args:
            encode: Makes the per-block arrays, by name, in one of the writer's threads.
            rows: The rest of what is stored of the block's views.

        Raises:
            ScaleKDError: What an earlier block met.
        """
        start = self._next_row
        self._next_row += len(rows.samples.keys)
        self._blocks.append(replace(rows, images=None))
        before = self._pending[-1] if self._pending else None
        if self._tar is None:
            write: Callable[[], None] = lambda: self._write_arrays(encode(), start)  # noqa: E731
        else:
            write = partial(self._write_members, self._tar, encode, rows, before)
        self._pending.append(self._writer.pool.submit(write))
        while len(self._pending) > _MAX_QUEUED_BLOCKS:
            self._pending.popleft().result()

    def _write_arrays(self, arrays: dict[str, Rows], start: int) -> None:
        for name, rows in arrays.items():
            self._writer.write(self._unit, self._writer.layout.find(name), start, rows)

    def _write_members(
        self,
        tar: TarShardFile,
        encode: Callable[[], dict[str, Rows]],
        rows: ViewRows,
        before: Future[None] | None,
    ) -> None:
        layout, samples = self._writer.layout, rows.samples
        planes = {
            name: np.moveaxis(stored, layout.find(name).view_axis, 0)
            for name, stored in encode().items()
        }
        packed = ViewPacking(layout.views).pack(
            {**planes, **rows.columns, SOURCE_HASH: samples.source_hashes}
        )
        block = make_block(samples.keys, samples.labels, packed, rows.images)
        if before is not None:
            before.result()  # blocks stand in order; the pool began that one before this one
        tar.append(block)

    def commit(self, skipped: Sequence[str]) -> None:
        """Write the per-shard arrays or the tar, and the commit record, once all blocks are done.

        Args:
            skipped: Keys of corrupt images left out.
        """
        for future in self._pending:
            future.result()
        layout, writer = self._writer.layout, self._writer
        rows = ViewRows.joined(self._blocks)
        if self._tar is None:
            self._write_arrays(rows.columns, self._shard * layout.identity.shard_size)
        elif self._blocks:
            tar, index = self._tar.close()
            writer.store.put(tar_path(self._unit, self._shard), tar)
            writer.store.put(index_path(self._unit, self._shard), index.to_bytes())
        else:
            self._tar.discard()
        samples_sha256 = writer.commit_samples(self._shard, rows.samples, skipped)
        if writer.approve is not None:
            hashes = rows.columns.get("pixel_hash", np.empty(0, np.uint64))
            writer.approve(self._unit, self._shard, samples_sha256, hashes)
        if not writer.leases.holds(self._unit, self._shard):
            raise EnvironmentFault(
                f"{writer.place.place}: this process stood still for so long that another took over"
                f" shard {self._shard} of pass {self._unit}; nothing is lost, run the same command"
                " again"
            )
        writer.record(self._unit, self._shard, len(rows.samples.keys), samples_sha256, skipped)
        writer.leases.release(self._unit, self._shard)


class CacheWriter:
    """One process's hand in a cache.

    Attributes:
        leases: The shards this process is writing.
        busy: Who else held a shard when :meth:`claim` was last asked for it.

    Args:
        root: Folder that files are written to, with the metadata of arrays (:func:`begin`).
        plan: The plan in force.
        layout: Its arrays.
        num_threads: Threads that code and write blocks beside the teacher.
        approve: Called with unit, shard, hash of the samples and pixel hashes before a shard is
            committed; may refuse by an error.
        place: Where the cache is, already begun, if not in ``root``: shards are sent there.
    """

    def __init__(
        self,
        root: Path,
        plan: Plan,
        layout: Layout,
        *,
        num_threads: int = 2,
        approve: Callable[[int, int, str, Rows], None] | None = None,
        place: Storage | None = None,
    ) -> None:
        self.approve = approve
        self.root = root
        self.folder = LocalStorage(root)
        self.place = place or self.folder
        self.plan = plan
        self.layout = layout
        self.store = CommittingStore(root)
        self.leases = Leases(root)
        self.busy: dict[tuple[Unit, int], LeaseHolder] = {}
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="cache-writer")
        self._opened: dict[str, zarr.Array[Any]] = {}
        self._tar: TarShardFile | None = None

    def __enter__(self) -> Self:
        self.leases.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.pool.shutdown(wait=True, cancel_futures=True)
            if self._tar is not None:
                self._tar.discard()
        finally:
            self.leases.__exit__(kind, error, traceback)

    def missing(self, unit: int, shards: Sequence[int]) -> Iterator[int]:
        """Those of ``shards`` that are not committed in pass ``unit``; checks those that are."""
        for shard in shards:
            if has_record(self.place, unit, shard):
                read_record(self.place, self.plan, self.layout, unit, shard)
            else:
                yield shard

    def claim(self, unit: Unit, shard: int) -> bool:
        """Take a shard, so that no other process writes it.

        Returns:
            Whether this process is to write it; not when it is committed, nor when another process
            is writing it, which :attr:`busy` then names.
        """
        self.busy.pop((unit, shard), None)
        if has_record(self.place, unit, shard):
            return False
        holder = self.leases.acquire(unit, shard)
        if holder is not None:
            self.busy[unit, shard] = holder
            return False
        if has_record(self.place, unit, shard):  # committed between the look and the claim
            self.leases.release(unit, shard)
            return False
        return True

    def elsewhere(self) -> tuple[str, ...]:
        """What other processes were writing when this one had no more to do."""
        return tuple(
            f"shard {shard} of pass {unit}: {holder}"
            for (unit, shard), holder in sorted(self.busy.items(), key=lambda item: str(item[0]))
            if unit != SAMPLES and not has_record(self.place, unit, shard)
        )

    def shard(self, unit: int, shard: int) -> ShardWriter:
        """Begin a shard; what an interrupted writer of it left is removed.

        Raises:
            CacheMismatch: It is committed, or another process is writing it.
        """
        self._open(unit)
        return ShardWriter(self, unit, shard)

    def new_tar(self) -> TarShardFile:
        """A tar for the next shard, in the cache's folder, where there is room for it."""
        self._tar = TarShardFile(self.root)
        return self._tar

    def _open(self, unit: Unit) -> None:
        for array in self.layout.zarr_arrays(unit):
            path = array_path(unit, array)
            if path not in self._opened:
                self._opened[path] = open_array(self.store, self.layout.identity, unit, array)

    def commit_samples(self, shard: int, samples: SampleRows, skipped: Sequence[str]) -> str:
        """Commit the samples of a shard, or check those that a writer of another pass committed.

        Returns:
            Their hash.

        Raises:
            CacheMismatch: The cache holds other samples.
        """
        samples_sha256 = samples_hash(samples.keys, samples.labels, samples.source_hashes)
        while not has_record(self.place, SAMPLES, shard):
            if not self.claim(SAMPLES, shard):
                time.sleep(_POLL_SECONDS)
                continue
            self.remove_debris(SAMPLES, shard)
            self._open(SAMPLES)
            columns = samples.columns(self.layout.identity.data.max_key_bytes)
            start = shard * self.layout.identity.shard_size
            for array in self.layout.samples:
                self.write(SAMPLES, array, start, columns[array.name])
            self.record(SAMPLES, shard, len(samples.keys), samples_sha256, skipped)
            self.leases.release(SAMPLES, shard)
        committed = read_record(self.place, self.plan, self.layout, SAMPLES, shard)
        if committed.samples_sha256 != samples_sha256:
            raise CacheMismatch(
                f"{self.place.place}: shard {shard} was cached with other samples, labels or images"
                " than the data set gives now; bring back the files it was begun with, or write a"
                " new cache"
            )
        return samples_sha256

    def record(
        self, unit: Unit, shard: int, num_rows: int, samples_sha256: str, skipped: Sequence[str]
    ) -> None:
        """Write a shard's commit record; all of its files were written by this process."""
        files: dict[str, FileDigest] = {}
        for path in self.layout.unit_files(unit, shard, num_rows):
            files[path] = self.store.written.pop(path)
        if self.place is not self.folder:
            send_files(self.folder, self.place, files, unit, shard)
            for path in files:
                self.folder.delete(path)
        write_record(
            self.place,
            ShardRecord(
                cache_id=self.plan.cache_id,
                unit=unit,  # type: ignore[arg-type]  # the one text a unit may be is checked
                shard=shard,
                num_rows=num_rows,
                samples_sha256=samples_sha256,
                files=files,
                skipped=tuple(skipped),
            ),
        )

    def remove_debris(self, unit: Unit, shard: int) -> None:
        """Delete what an interrupted writer of this shard left, temporary files included."""
        rows = self.layout.identity.rows_of(shard)
        for path in self.layout.unit_files(unit, shard, rows):
            target = inside(self.root, path)
            with explained(target, "cannot remove"):
                target.unlink(missing_ok=True)
                for partial in target.parent.glob(f".{target.name}.*{TEMPORARY_SUFFIX}"):
                    partial.unlink(missing_ok=True)

    def write(self, unit: Unit, array: ArraySpec, start: int, rows: np.ndarray[Any, Any]) -> None:
        """Write rows of one array, padded to whole chunks."""
        if not rows.shape[array.view_axis]:
            return  # a shard that lost every image has no files
        opened = self._opened[array_path(unit, array)]
        step = array.rows_per_chunk(self.layout.identity)
        end = min(start + step, self.layout.identity.data.num_samples)
        write_rows(opened, array, start, rows, span=end - start)


def finish(place: Place, plan: Plan, layout: Layout, num_passes: int) -> Manifest | None:
    """Write the manifest if every shard of every pass is committed, else return ``None``.

    Another job may have added passes meanwhile; they are kept.

    Raises:
        CacheError: A record is damaged, or a pass holds other samples than the cache's table.
    """
    storage = open_storage(place)
    num_passes = max(num_passes, committed_passes(storage, plan))
    shards = range(plan.identity.num_shards)
    units: tuple[Unit, ...] = (SAMPLES, *range(num_passes))
    if not all_recorded(storage, units, shards):
        return None
    if isinstance(storage, LocalStorage):
        remove_settled(storage.root)
    manifest = manifest_of(storage, plan, layout, num_passes)
    info = timm_info(storage, plan, layout)
    if info is not None:
        commit_documents(storage, {INFO_FILE: info})
    commit_documents(storage, {MANIFEST_FILE: canonical(manifest)})
    return manifest


def timm_info(storage: Storage, plan: Plan, layout: Layout) -> bytes | None:
    """``_info.json`` of a cache that holds images; it depends on pass 0 alone, and never changes.

    Raises:
        CacheError: A record of pass 0 is missing or damaged.
    """
    if layout.form is None or layout.form.embed == "none":
        return None
    shards = range(plan.identity.num_shards)
    return info_document({s: read_record(storage, plan, layout, 0, s).num_rows for s in shards})


def manifest_of(place: Place, plan: Plan, layout: Layout, num_passes: int) -> Manifest:
    """The manifest that plan and commit records make; they leave no choice.

    Raises:
        CacheError: A record is missing or damaged, or a pass holds other samples than the table.
    """
    storage, identity = open_storage(place), plan.identity
    units: tuple[Unit, ...] = (SAMPLES, *range(num_passes))
    files = {PLAN_FILE: digest(canonical(plan)), **table_files(identity)}
    if layout.form is not None:
        files[FORM_FILE] = digest(canonical(layout.form))
    info = timm_info(storage, plan, layout)
    if info is not None:
        files[INFO_FILE] = digest(info)
    for unit in units:
        documents = unit_documents(layout, unit)
        files |= {relative: digest(content) for relative, content in documents.items()}
    records: dict[str, str] = {}
    samples: list[str] = []
    skipped: list[str] = []
    num_views, total_bytes = 0, sum(entry.num_bytes for entry in files.values())
    for unit in units:
        for shard in range(identity.num_shards):  # one record in memory at a time
            record = read_record(storage, plan, layout, unit, shard)
            records[record_path(unit, shard)] = record_hash(record)
            total_bytes += sum(entry.num_bytes for entry in record.files.values())
            if unit == SAMPLES:
                samples.append(record.samples_sha256)
                skipped.extend(record.skipped)
                continue
            num_views += record.num_rows
            if record.samples_sha256 != samples[shard]:
                raise CacheCorrupt(
                    f"{storage.place}: shard {shard} of pass {unit} holds other samples than the"
                    " cache's table"
                )
    return Manifest(
        plan=plan,
        num_passes=num_passes,
        num_views=num_views,
        skipped=tuple(skipped),
        files=files,
        records=records,
        total_bytes=total_bytes,
    ).sealed()


def committed_passes(place: Place, plan: Plan) -> int:
    """Passes of the manifest that stands; 0 before the first is written.

    Raises:
        CacheCorrupt: The manifest is damaged.
        CacheMismatch: It is the manifest of another cache.
    """
    storage = open_storage(place)
    path = storage.locate(MANIFEST_FILE)
    if not storage.exists(MANIFEST_FILE):
        return 0
    data = read_bounded(storage, MANIFEST_FILE, max_bytes=MAX_JSON_BYTES, what="the manifest")
    try:
        manifest = parse_committed(Manifest, data, where=path)
    except CacheCorrupt as error:
        raise CacheCorrupt(
            f"{error}; delete it and run the same command again: it is made from the records"
        ) from None
    if manifest.plan.cache_id != plan.cache_id:
        raise CacheMismatch(
            f"{path}: is of cache {manifest.plan.cache_id[:12]}…, and the plan beside it of"
            f" {plan.cache_id[:12]}…: files of two caches were mixed"
        )
    return manifest.num_passes
