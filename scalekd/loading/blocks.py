"""Read rows of a cache in any order, one block at a time; prefetch blocks of a remote cache."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from scalekd.cache import CacheReader, JoinedReader
from scalekd.loading.order import BUFFER_BLOCKS, LANES_PER_RANK
from scalekd.shapes import Rows
from scalekd.storage.in_flight import Prefetcher

Block = dict[str, Rows]
_BlockId = tuple[int, int]  # pass and number of a block


class BlockReader:
    """Reads blocks of a cache, and keeps those in use.

    It may be forked into another process, which then reads its own blocks.

    Args:
        reader: The cache.
        names: Arrays to read, such as ``stage4/codes``.
        kept_blocks: Number of blocks in memory; the least recently used one is dropped.
    """

    def __init__(
        self,
        reader: CacheReader | JoinedReader,
        names: Sequence[str],
        *,
        kept_blocks: int = LANES_PER_RANK * BUFFER_BLOCKS,
    ) -> None:
        self.reader = reader
        self._names = tuple(names)
        self._kept_blocks = kept_blocks
        self._extents = reader.blocks()
        self._starts = np.array([first for first, _ in self._extents])
        self._blocks: OrderedDict[_BlockId, Block] = OrderedDict()
        self._prefetcher: Prefetcher[_BlockId, Block] = Prefetcher(self._read, 3 * kept_blocks)
        self._pass_index = 0
        self._process = os.getpid()

    def prefetch(self, pass_index: int, samples: Iterable[int]) -> None:
        """Start fetching the blocks of samples that will be used next.

        Blocks on a local disk are read when they are needed, without a thread.
        """
        if self.reader.is_remote:
            self._prepare(pass_index)
            numbers = np.searchsorted(self._starts, list(samples), side="right") - 1
            block_ids = dict.fromkeys((pass_index, int(number)) for number in numbers)
            self._prefetcher.request(key for key in block_ids if key not in self._blocks)

    def find(self, pass_index: int, sample: int) -> tuple[Block, int]:
        """Return the block that contains a sample's view, and the view's row in it.

        Raises:
            CacheCorrupt: A file of the block is missing or is not the one committed.
        """
        self._prepare(pass_index)
        block_id = pass_index, int(np.searchsorted(self._starts, sample, side="right")) - 1
        block = self._blocks.get(block_id)
        if block is None:
            block = self._prefetcher.take(block_id)
            self._blocks[block_id] = block
            if len(self._blocks) > self._kept_blocks:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(block_id)
        return block, sample - self._extents[block_id[1]][0]

    def _prepare(self, pass_index: int) -> None:
        """Reopen the reader in a forked process; drop prefetched blocks of another pass."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._blocks.clear()
            self.reader = self.reader.reopened()
        if self._pass_index != pass_index:
            self._pass_index = pass_index
            self._prefetcher.clear()

    def _read(self, block_id: _BlockId) -> Block:
        pass_index, number = block_id
        return self.reader.read_rows(pass_index, *self._extents[number], self._names)


def gather(rows: Sequence[tuple[Block, int]], name: str, out: Rows) -> None:
    """Copy one array's values of views into ``out``, view axis first.

    Args:
        rows: Block of each view, and the view's row in it.
        name: Name of the array.
        out: Array to fill, ``(view, …)``.
    """
    for index, (block, row) in enumerate(rows):
        out[index] = block[name][row]
