"""Rows of a cache in any order, read a block at a time."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from scalekd.cache import CacheReader
from scalekd.data.order import BUFFER_BLOCKS, LANES_PER_RANK

Rows = np.ndarray[Any, Any]
Block = dict[str, Rows]


class BlockReader:
    """Finds views in blocks, which are kept while they are in use.

    May be forked into another process, which then reads blocks of its own.

    Args:
        reader: The cache.
        names: Arrays to read, such as ``stage4/codes``.
        kept_blocks: Blocks in memory; the one longest not asked for goes first.
    """

    def __init__(
        self,
        reader: CacheReader,
        names: Sequence[str],
        *,
        kept_blocks: int = LANES_PER_RANK * BUFFER_BLOCKS,
    ) -> None:
        self.reader = reader
        self._names = tuple(names)
        self._kept_blocks = kept_blocks
        self._extents = reader.blocks()
        self._starts = np.array([first for first, _ in self._extents])
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._process = os.getpid()

    def find(self, pass_index: int, sample: int) -> tuple[Block, int]:
        """The block that holds a sample's view, and its row there.

        Raises:
            CacheCorrupt: A file of the block is missing or is not the one committed.
        """
        if self._process != os.getpid():
            self._process = os.getpid()
            self._blocks.clear()
            self.reader = self.reader.reopened()
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        first, count = self._extents[number]
        block = self._blocks.get((pass_index, number))
        if block is None:
            block = self.reader.read_rows(pass_index, first, count, self._names)
            self._blocks[pass_index, number] = block
            if len(self._blocks) > self._kept_blocks:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end((pass_index, number))
        return block, sample - first


def gather(found: Sequence[tuple[Block, int]], name: str, out: Rows) -> None:
    """Copy one array's rows of found views into ``out``, view axis first."""
    for place, (block, row) in enumerate(found):
        out[place] = block[name][row]
