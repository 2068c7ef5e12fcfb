"""Write the shards of a cache, in any order, from any number of processes.

A shard is written by the process that has its lease. Its files appear one by one, each atomically,
and belong to the cache only once the shard's commit record exists. A killed writer leaves committed
shards, whole files of at most one uncommitted shard, its leases, and temporary files; the next run
takes over the leases and writes that shard again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import zarr

from scalekd.cache.cache import Cache
from scalekd.cache.documents.manifest import ShardRecord
from scalekd.cache.documents.records import samples_hash, write_record
from scalekd.cache.files import FileDigest
from scalekd.cache.forms import ShardFiles
from scalekd.cache.forms.store import CommittingStore, open_array, write_rows
from scalekd.cache.layout import SAMPLES, ArraySpec, Layout, ShardId, Unit, array_path
from scalekd.cache.writing.in_flight import InFlight
from scalekd.cache.writing.lease import LeaseHolder, Leases
from scalekd.cache.writing.publish import send_files
from scalekd.cache.writing.rows import SampleRows
from scalekd.cache.writing.shard_writer import ShardWriter
from scalekd.errors import CacheMismatch, EnvironmentFault
from scalekd.shapes import Rows
from scalekd.storage.files import TEMPORARY_SUFFIX, explained, inside

_POLL_SECONDS = 0.05  # while another process commits the samples of a shard, which takes moments
# Views in memory when encoding is slower than the teacher: blocks that are being filled or written,
# one batch on the device and the next one, and some tasks per thread. A block is written by one
# thread, so threads are idle if there are fewer blocks: with 4 blocks that took 0.8 s each, a
# teacher of 1,800 views/s waited a fifth of the time (docs/LOG.md).
_LEAST_BLOCKS_IN_FLIGHT = 4
_BYTES_IN_FLIGHT = 2 << 30
_VIEWS_A_THREAD = 32


def blocks_in_flight(layout: Layout, num_threads: int) -> int:
    """Return the number of blocks in memory: one per thread, if memory allows."""
    values = sum(array.values_per_view for array in layout.views if array.per_block)
    block_bytes = 4 * values * layout.identity.block_size  # as features in float32
    affordable = _BYTES_IN_FLIGHT // max(1, block_bytes)
    return max(_LEAST_BLOCKS_IN_FLIGHT, min(num_threads, affordable))


class CacheWriter:
    """Writes shards of a cache, for one process.

    Attributes:
        leases: Leases of the shards that this process is writing.
        in_flight: Limits the views in memory, and relays errors of threads.
        last_commit: The last commit in the background.
        busy: Holder of each lease that :meth:`claim` could not take.

    Args:
        cache: The cache, already begun.
        folder: For a cache on a remote store: local folder with the metadata of arrays, from which
            complete shards are sent.
        num_threads: Threads that encode and write blocks while the teacher runs.
        approve: Called with unit, shard, hash of the samples and pixel hashes before a shard is
            committed; raises an error to refuse it.
        computed: How this process computes targets, for the records of its shards.
    """

    def __init__(
        self,
        cache: Cache,
        folder: Path | None = None,
        *,
        num_threads: int = 2,
        approve: Callable[[int, int, str, Rows], None] | None = None,
        computed: dict[str, str] | None = None,
    ) -> None:
        self.approve = approve
        self.computed = computed
        self.cache = cache
        if folder is None:
            folder = cache.storage.root
        if folder is None:
            raise ValueError(f"{cache.location}: writing to a remote store needs a local folder")
        self.root = root = folder
        self.is_remote = cache.storage.is_remote
        self.storage = cache.storage
        self.plan = plan = cache.plan
        self.layout = cache.layout
        self.store = CommittingStore(root, check=self._check_file)
        self.folder = self.store.folder
        self._claimed: dict[str, tuple[Unit, int]] = {}  # shard of each file that may be written
        self.leases = Leases(root)
        self.busy: dict[tuple[Unit, int], LeaseHolder] = {}
        identity = plan.identity
        self.in_flight = InFlight(
            blocks_in_flight(self.layout, num_threads) * identity.block_size
            + 2 * identity.batch_size
            + _VIEWS_A_THREAD * num_threads
        )
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="cache-writer")
        self.unwritten: set[Future[None]] = set()
        self.last_commit: Future[None] | None = None
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="cache-committer")
        self._opened: dict[str, zarr.Array[Any]] = {}
        self._shard_files: list[ShardFiles] = []

    def __enter__(self) -> Self:
        self.leases.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.pool.shutdown(wait=True, cancel_futures=True)
            for block in list(self.unwritten):  # ends a commit that waits for them
                block.set_exception(CancelledError())
            self._committer.shutdown(wait=True, cancel_futures=True)
            for files in self._shard_files:
                files.discard()
        finally:
            self.leases.__exit__(*error)

    def missing(self, unit: int, shards: Sequence[int]) -> Iterator[int]:
        """Yield the shards of a pass that are not committed; check the records of the others."""
        for shard in shards:
            if self.has_record(unit, shard):
                self.cache.record(ShardId(unit, shard))
            else:
                yield shard

    def has_record(self, unit: Unit, shard: int) -> bool:
        """Return whether a shard is committed."""
        return self.cache.has(ShardId(unit, shard))

    def claim(self, unit: Unit, shard: int) -> bool:
        """Take the lease of a shard, so that no other process writes it.

        Returns:
            ``False`` if the shard is committed, or if another process is writing it, which is then
            in :attr:`busy`.
        """
        self.busy.pop((unit, shard), None)
        if self.has_record(unit, shard):
            return False
        holder = self.leases.acquire(unit, shard)
        if holder is not None:
            self.busy[unit, shard] = holder
            return False
        if self.has_record(unit, shard):  # committed since the first check
            self.leases.release(unit, shard)
            return False
        rows = self.layout.identity.rows_of(shard)
        self._claimed |= dict.fromkeys(self.layout.unit_files(unit, shard, rows), (unit, shard))
        return True

    def check_claim(self, unit: Unit, shard: int) -> None:
        """Check that this process may still write a shard.

        If it was suspended for long (with its machine, or by a file system that did not respond),
        another process may have taken the shard over, and even committed it.

        Raises:
            EnvironmentFault: Another process took the shard over.
        """
        # On a remote store the record is checked when files are sent (publish.py).
        committed = not self.is_remote and self.has_record(unit, shard)
        if committed or not self.leases.holds(unit, shard):
            raise EnvironmentFault(
                f"{self.storage.location}: this process was suspended for so long that another took"
                f" over {ShardId(unit, shard)}; nothing is lost, run the same command again"
            )

    def _check_file(self, relative: str) -> None:
        self.check_claim(*self._claimed[relative])

    def elsewhere(self) -> tuple[str, ...]:
        """Return the shards that other processes are writing, with their holders, as text."""
        return tuple(
            f"{ShardId(unit, shard)}: {holder}"
            for (unit, shard), holder in sorted(self.busy.items(), key=lambda item: str(item[0]))
            if unit != SAMPLES and not self.has_record(unit, shard)
        )

    def shard(self, unit: int, shard: int) -> ShardWriter:
        """Begin a shard; files that an interrupted writer left are deleted.

        Raises:
            CacheMismatch: The shard is committed, or another process is writing it.
        """
        self._open(unit)
        return ShardWriter(self, unit, shard)

    def begin_files(self, unit: int, shard: int) -> ShardFiles:
        """Return the files of the next shard; those of the one being committed are kept."""
        begun = self.layout.form.shard_files(self, unit, shard)
        self._shard_files = [*self._shard_files[-1:], begun]
        return begun

    def put(self, relative: str, data: bytes | memoryview) -> None:
        """Commit a file of a claimed shard."""
        self.store.put(relative, data)

    def commit_behind(self, shard: ShardWriter, skipped: Sequence[str]) -> None:
        """Commit a shard in the background, after the commit before it.

        Raises:
            ScaleKDError: The commit before it failed.
        """
        self.settle()

        def commit() -> None:
            try:
                shard.commit(skipped)
            except BaseException as error:
                self.in_flight.fail(error)
                raise

        self.last_commit = self._committer.submit(commit)

    def settle(self) -> None:
        """Wait for the commit in the background.

        Raises:
            ScaleKDError: The commit failed.
        """
        if self.last_commit is not None:
            self.last_commit.result()

    def _open(self, unit: Unit) -> None:
        for array in self.layout.zarr_arrays(unit):
            path = array_path(unit, array)
            if path not in self._opened:
                self._opened[path] = open_array(self.store, self.layout.identity, unit, array)

    def commit_samples(self, shard: int, samples: SampleRows, skipped: Sequence[str]) -> str:
        """Commit the samples of a shard, or compare them with those that are committed.

        Returns:
            Hash of the samples.

        Raises:
            CacheMismatch: The cache contains other samples.
        """
        samples_sha256 = samples_hash(samples.keys, samples.labels, samples.source_hashes)
        while not self.has_record(SAMPLES, shard):
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
        committed = self.cache.record(ShardId(SAMPLES, shard))
        if committed.samples_sha256 != samples_sha256:
            raise CacheMismatch(
                f"{self.storage.location}: shard {shard} was cached with other samples, labels or"
                " images than the data set contains now; restore the original files, or write a"
                " new cache"
            )
        return samples_sha256

    def record(
        self,
        unit: Unit,
        shard: int,
        num_rows: int,
        samples_sha256: str,
        skipped: Sequence[str],
        computed: dict[str, str] | None = None,
    ) -> None:
        """Write a shard's commit record; all of its files were written by this process."""
        files: dict[str, FileDigest] = {}
        for path in self.layout.unit_files(unit, shard, num_rows):
            files[path] = self.store.written.pop(path)
        if self.is_remote:
            send_files(self.folder, self.storage, files, ShardId(unit, shard))
            for path in files:
                self.folder.delete(path)
        write_record(
            self.storage,
            ShardRecord(
                cache_id=self.plan.cache_id,
                unit=unit,  # type: ignore[arg-type]  # checked by the model
                shard=shard,
                num_rows=num_rows,
                samples_sha256=samples_sha256,
                files=files,
                skipped=tuple(skipped),
                computed=None if computed == self.plan.provenance.computed else computed,
            ),
        )
        for path in self.layout.unit_files(unit, shard, self.layout.identity.rows_of(shard)):
            self._claimed.pop(path, None)

    def remove_debris(self, unit: Unit, shard: int) -> None:
        """Delete the files, also temporary ones, that an interrupted writer of a shard left."""
        rows = self.layout.identity.rows_of(shard)
        for path in self.layout.unit_files(unit, shard, rows):
            target = inside(self.root, path)
            with explained(target, "cannot remove"):
                self.check_claim(unit, shard)
                target.unlink(missing_ok=True)
                for partial in target.parent.glob(f".{target.name}.*{TEMPORARY_SUFFIX}"):
                    partial.unlink(missing_ok=True)

    def write(self, unit: Unit, array: ArraySpec, start: int, rows: Rows) -> None:
        """Write rows of one array, padded to whole chunks."""
        if not rows.shape[array.view_axis]:
            return  # every image was skipped: no files
        opened = self._opened[array_path(unit, array)]
        step = array.rows_per_chunk(self.layout.identity)
        end = min(start + step, self.layout.identity.data.num_samples)
        write_rows(opened, array, start, rows, span=end - start)
