"""Writing a cache: plan first, then shards in any order by any process, the manifest last.

A shard is written by one process, the one that holds its lease. Its files appear one by one, each
atomically, and count for nothing until the shard's commit record stands. A killed writer leaves
committed shards, whole files of at most one uncommitted shard, its leases, and temporary files; the
next run takes over and redoes that shard.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr

from scalekd.cache.files import FileDigest
from scalekd.cache.layout import SAMPLES, ArraySpec, Layout, Unit, array_path
from scalekd.cache.lease import LeaseHolder, Leases
from scalekd.cache.manifest import Plan, ShardRecord
from scalekd.cache.publish import send_files
from scalekd.cache.records import has_record, read_record, samples_hash, write_record
from scalekd.cache.store import CommittingStore, open_array, write_rows
from scalekd.cache.webdataset.blocks import make_block
from scalekd.cache.webdataset.form import index_path, tar_path
from scalekd.cache.webdataset.packing import SOURCE_HASH, ViewPacking
from scalekd.cache.webdataset.shard_file import TarShardFile
from scalekd.errors import CacheMismatch, EnvironmentFault
from scalekd.storage import LocalStorage, Storage
from scalekd.storage.files import TEMPORARY_SUFFIX, explained, inside

Rows = np.ndarray[Any, Any]

_POLL_SECONDS = 0.05  # of another process that commits the samples of a shard: a moment's work
_MAX_QUEUED_BLOCKS = 4  # bounds memory when coding falls behind the teacher


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
