"""Rows of a cache in any order, read a block at a time; those of a remote cache ahead of use."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from scalekd.cache import CacheReader, JoinedReader
from scalekd.loading.order import BUFFER_BLOCKS, LANES_PER_RANK
from scalekd.storage.in_flight import Ahead

Rows = np.ndarray[Any, Any]
Block = dict[str, Rows]
_Place = tuple[int, int]  # pass and number of a block


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
        self._blocks: OrderedDict[_Place, Block] = OrderedDict()
        # Those wanted and not asked for yet; a wrong guess costs no more than the right ones.
        self._ahead: Ahead[_Place, Block] = Ahead(self._read, 3 * kept_blocks)
        self._pass_index = 0
        self._process = os.getpid()

    def want(self, pass_index: int, samples: Iterable[int]) -> None:
        """Begin to fetch the blocks of samples that are going to be asked for.

        Blocks on a local disk are not worth a thread.
        """
        if self.reader.is_remote:
            self._settle(pass_index)
            numbers = np.searchsorted(self._starts, list(samples), side="right") - 1
            places = dict.fromkeys((pass_index, int(number)) for number in numbers)
            self._ahead.want(place for place in places if place not in self._blocks)

    def find(self, pass_index: int, sample: int) -> tuple[Block, int]:
        """The block that holds a sample's view, and its row there.

        Raises:
            CacheCorrupt: A file of the block is missing or is not the one committed.
        """
        self._settle(pass_index)
        place = pass_index, self._number(sample)
        block = self._blocks.get(place)
        if block is None:
            block = self._ahead.take(place)
            self._blocks[place] = block
            if len(self._blocks) > self._kept_blocks:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(place)
        return block, sample - self._extents[place[1]][0]

    def _settle(self, pass_index: int) -> None:
        """A forked process reads for itself; a reader is in one pass at a time."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._blocks.clear()
            self.reader = self.reader.reopened()
        if self._pass_index != pass_index:
            self._pass_index = pass_index
            self._ahead.clear()

    def _number(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def _read(self, place: _Place) -> Block:
        pass_index, number = place
        return self.reader.read_rows(pass_index, *self._extents[number], self._names)


def gather(found: Sequence[tuple[Block, int]], name: str, out: Rows) -> None:
    """Copy one array's rows of found views into ``out``, view axis first."""
    for place, (block, row) in enumerate(found):
        out[place] = block[name][row]
