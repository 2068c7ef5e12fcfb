"""The order in which an epoch visits the views of a cache.

A block is the unit of reading, so the order shuffles blocks, then views inside a buffer of a
few blocks. Batches are dealt to *lanes*: lane ``g`` owns every ``g``-th block of the shuffled
list and makes batches ``g``, ``g + lanes``, …. Loader workers take batches in turn, so while
the number of workers divides the number of lanes, each worker decodes only the blocks of its
own lanes; and the order is the same for every number of workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LANES_PER_RANK = 8
"""Divisible by 1, 2, 4 and 8 workers; with other numbers some blocks are decoded twice."""


def even_workers(num_workers: int) -> int:
    """Return the most workers, at most as many as given, that share lanes evenly.

    With others every worker visits several lanes in turn, and reads each block anew for each batch:
    14 workers would decode embedded pixels four times, and 8 are faster.
    """
    if num_workers >= LANES_PER_RANK:
        return num_workers - num_workers % LANES_PER_RANK
    while num_workers and LANES_PER_RANK % num_workers:
        num_workers -= 1
    return num_workers


BUFFER_BLOCKS = 4
"""Blocks that a lane shuffles together: 1,024 views at the default block size."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochOrder:
    """Deterministic order of one epoch, a function of seed, epoch, batch size and world size.

    Attributes:
        blocks: ``(first sample, number of samples)`` of each block.
        batch_size: Views per batch on one rank.
        seed: Seed of the run.
        rank: Rank of this process.
        world_size: Number of processes. Every rank gets the same number of full batches; the
            views left over are different ones every epoch.
        shuffle: Whether to shuffle; ``False`` keeps the stored order of blocks and views.
    """

    blocks: tuple[tuple[int, int], ...]
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True

    @property
    def num_batches(self) -> int:
        """Number of batches of one rank in one epoch."""
        return sum(count for _, count in self.blocks) // (self.batch_size * self.world_size)

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Indices]:
        """Sample numbers of each batch of this rank, from batch ``start`` on."""
        for number, batch in enumerate(self._global_batches(epoch)):
            step, rank = divmod(number, self.world_size)
            if step >= self.num_batches:
                return
            if rank == self.rank and step >= start:
                yield batch

    def _global_batches(self, epoch: int) -> Iterator[Indices]:
        """Batches of all ranks in turn: rank 0's first, rank 1's first, …"""
        random = np.random.default_rng([self.seed, epoch])
        blocks = np.asarray(self.blocks, dtype=np.int64)
        if self.shuffle:
            blocks = random.permutation(blocks)
        num_lanes = LANES_PER_RANK * self.world_size if self.shuffle else 1
        lanes = [
            _lane(blocks[lane::num_lanes], random.spawn(1)[0] if self.shuffle else None)
            for lane in range(num_lanes)
        ]
        waiting = [np.empty(0, np.int64)] * num_lanes
        leftover: list[Indices] = []
        active = list(range(num_lanes))
        while active:
            for lane in list(active):
                while len(waiting[lane]) < self.batch_size:
                    more = next(lanes[lane], None)
                    if more is None:
                        leftover.append(waiting[lane])
                        active.remove(lane)
                        break
                    waiting[lane] = np.concatenate([waiting[lane], more])
                else:
                    batch, waiting[lane] = np.split(waiting[lane], [self.batch_size])
                    yield batch
        # Views left over in the lanes are pooled, so that small caches lose no full batch.
        rest = np.concatenate(leftover)
        if self.shuffle:
            rest = random.permutation(rest)
        for first in range(0, len(rest) - self.batch_size + 1, self.batch_size):
            yield rest[first : first + self.batch_size]


def _lane(blocks: npt.NDArray[np.int64], random: np.random.Generator | None) -> Iterator[Indices]:
    """Views of a lane's blocks, a shuffled buffer at a time."""
    for first in range(0, len(blocks), BUFFER_BLOCKS):
        views = np.concatenate(
            [
                np.arange(start, start + count)
                for start, count in blocks[first : first + BUFFER_BLOCKS]
            ]
        )
        yield random.permutation(views) if random is not None else views
