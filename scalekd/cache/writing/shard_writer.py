"""Write one shard: blocks are collected and written while the teacher runs, then committed."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from scalekd.cache.layout import ShardId
from scalekd.cache.writing.rows import ViewRows
from scalekd.errors import CacheMismatch
from scalekd.shapes import Rows

if TYPE_CHECKING:
    from scalekd.cache.writing.writer import CacheWriter


class OpenBlock:
    """A block whose arrays arrive in parts, from any thread and in any order.

    The thread that delivers the last part writes the block.
    """

    def __init__(self, shard: "ShardWriter", index: int) -> None:
        self._shard = shard
        self._index = index
        self._lock = threading.Lock()
        self._parts: dict[str, list[tuple[int, Rows]]] = {}
        self._num_missing = 1  # calls of `put`, and the call of `seal`
        self._rows: ViewRows | None = None
        self.written: Future[None] = Future()

    def expect(self) -> None:
        """Announce one more call of :meth:`put`."""
        with self._lock:
            self._num_missing += 1

    def put(self, start: int, arrays: dict[str, Rows]) -> None:
        """Deliver rows of some arrays.

        Args:
            start: Index in the block of the first row.
            arrays: Rows by name of the array, with the view axis where the layout has it.
        """
        with self._lock:
            for name, rows in arrays.items():
                self._parts.setdefault(name, []).append((start, rows))
        if self._is_complete():
            self._shard.write_when_allowed(self._write)

    def seal(self, rows: ViewRows) -> None:
        """Declare that all parts were announced, and deliver the views' other values."""
        self._rows = rows
        if self._is_complete():
            self._shard.submit(lambda: self._shard.write_when_allowed(self._write))

    def fail(self, error: BaseException) -> None:
        """Report an error, because of which a part will not be delivered."""
        self._shard.in_flight.fail(error)
        with self._lock:
            if not self.written.done():
                self.written.set_exception(error)

    def _is_complete(self) -> bool:
        with self._lock:
            self._num_missing -= 1
            return self._num_missing == 0 and not self.written.done()

    def _write(self) -> None:
        rows, parts = self._rows, self._parts
        if rows is None:
            raise RuntimeError("a block is written before it is sealed")
        try:
            self._shard.files.append(self._index, self._joined(parts), rows)
        except BaseException as error:
            self.fail(error)
        else:
            self._parts = {}
            self._shard.in_flight.leave(len(rows.samples.keys))
            self.written.set_result(None)

    def _joined(self, parts: dict[str, list[tuple[int, Rows]]]) -> dict[str, Rows]:
        layout = self._shard.layout
        joined = {}
        for name, pieces in parts.items():
            rows = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
            axis = layout.find(name).view_axis
            joined[name] = (
                np.ascontiguousarray(rows[0]) if len(rows) == 1 else np.concatenate(rows, axis)
            )
        return joined


class ShardWriter:
    """Writes the blocks of one shard, and commits them.

    A pool of threads encodes and writes blocks while the teacher runs. While the shard before is
    being committed, complete blocks wait in memory, so that a killed process leaves files of only
    one uncommitted shard.
    """

    def __init__(self, writer: "CacheWriter", unit: int, shard: int) -> None:
        self._writer = writer
        self._unit = unit
        self._shard = shard
        self._opened: list[OpenBlock] = []
        self._blocks: list[ViewRows] = []
        self._before = writer.last_commit
        self.layout = writer.layout
        self.in_flight = writer.in_flight
        if not writer.claim(unit, shard):
            holder = writer.busy.get((unit, shard))
            raise CacheMismatch(
                f"{writer.storage.location}: {ShardId(unit, shard)} "
                + (f"is being written by {holder}" if holder else "is already committed")
                + "; a shard is written once"
            )
        writer.remove_debris(unit, shard)
        self.files = writer.begin_files(unit, shard)

    def open_block(self) -> OpenBlock:
        """Open the next block."""
        block = OpenBlock(self, len(self._opened))
        self._opened.append(block)
        self._writer.unwritten.add(block.written)
        block.written.add_done_callback(self._writer.unwritten.discard)
        return block

    def seal_block(self, block: OpenBlock, rows: ViewRows) -> None:
        """Declare that all parts of a block were announced; seal blocks in the order of opening.

        Args:
            block: The block.
            rows: The values of its views besides the teacher's targets.
        """
        self._blocks.append(replace(rows, images=None))
        block.seal(rows)

    def write_block(self, encode: Callable[[], dict[str, Rows]], rows: ViewRows) -> None:
        """Queue the next block; waits while too many views are queued.

        Args:
            encode: Function that returns the per-block arrays by name; runs in a writer's thread.
            rows: The other values of the block's views.

        Raises:
            ScaleKDError: Writing an earlier block failed.
        """
        self.in_flight.enter(len(rows.samples.keys))
        block = self.open_block()
        block.expect()
        self.run(lambda: block.put(0, encode()), [block])
        self.seal_block(block, rows)

    def run(self, work: Callable[[], None], blocks: Sequence[OpenBlock]) -> None:
        """Run ``work`` in one of the writer's threads; report an error to ``blocks``."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                for block in blocks:
                    block.fail(error)

        self.submit(guarded)

    def submit(self, work: Callable[[], None]) -> None:
        """Run ``work``, which must not raise, in one of the writer's threads."""
        self._writer.pool.submit(work)

    def write_when_allowed(self, write: Callable[[], None]) -> None:
        """Call ``write`` now, in this thread, or when the shard before is committed."""
        before = self._before
        if before is None or before.done():
            write()
            return

        def then(commit: Future[None]) -> None:
            # Nothing is written after an error, or after the writer was closed.
            if not commit.cancelled() and commit.exception() is None:
                with contextlib.suppress(RuntimeError):
                    self.submit(write)

        before.add_done_callback(then)

    def commit(self, skipped: Sequence[str], computed: dict[str, str] | None = None) -> None:
        """Write the per-shard arrays or the tar, and the commit record, once all blocks are done.

        Args:
            skipped: Keys of corrupt images that were skipped.
            computed: How the targets were computed; the writer's default when ``None``.
        """
        for block in self._opened:
            block.written.result()
        writer, rows = self._writer, ViewRows.joined(self._blocks)
        self.files.finish(rows)
        samples_sha256 = writer.commit_samples(self._shard, rows.samples, skipped)
        if writer.approve is not None:
            hashes = rows.columns.get("pixel_hash", np.empty(0, np.uint64))
            writer.approve(self._unit, self._shard, samples_sha256, hashes)
        writer.check_claim(self._unit, self._shard)
        writer.record(
            self._unit,
            self._shard,
            len(rows.samples.keys),
            samples_sha256,
            skipped,
            computed or writer.computed,
        )
        writer.leases.release(self._unit, self._shard)
