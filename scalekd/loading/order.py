"""The order of the views of a cache in an epoch.

A block is the unit of reading, so blocks are shuffled, and then views within a buffer of a few
blocks. Blocks and batches are divided among *lanes*: of ``n`` lanes, lane ``g`` has the blocks
``g``, ``g + n``, … of the shuffled list, and makes the batches of the same numbers. Workers of a
loader take batches in turn. If their number divides the number of lanes, each worker reads only the
blocks of its own lanes. The order does not depend on the number of workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LANES_PER_RANK = 8
"""Lanes of one process, divisible by 1, 2, 4 and 8 workers; others read some blocks twice."""


def even_workers(num_workers: int) -> int:
    """Return the largest number of workers, up to the given one, that divides the lanes evenly.

    With other numbers each worker makes batches of several lanes in turn, and reads blocks again
    for each batch: 14 workers would decode embedded pixels four times, and are slower than 8.
    """
    if num_workers >= LANES_PER_RANK:
        return num_workers - num_workers % LANES_PER_RANK
    while num_workers and LANES_PER_RANK % num_workers:
        num_workers -= 1
    return num_workers


BUFFER_BLOCKS = 4
"""Number of blocks that a lane shuffles together: 1,024 views with the default block size."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochOrder:
    """Deterministic order of one epoch, a function of seed, epoch, batch size and world size.

    Attributes:
        blocks: ``(first sample, number of samples)`` of each block.
        batch_size: Number of views in a batch of one rank.
        seed: Seed of the run.
        rank: Rank of this process.
        world_size: Number of processes. All ranks have the same number of full batches; the
            remaining views are not used, and are others in each epoch.
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
        """Yield the samples of each batch of this rank, from batch ``start`` on."""
        for number, batch in enumerate(self._global_batches(epoch)):
            step, rank = divmod(number, self.world_size)
            if step >= self.num_batches:
                return
            if rank == self.rank and step >= start:
                yield batch

    def _global_batches(self, epoch: int) -> Iterator[Indices]:
        """Yield the batches of all ranks in turn: the first of rank 0, the first of rank 1, …"""
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
        # The remaining views of all lanes are joined, so that small caches lose no full batch.
        rest = np.concatenate(leftover)
        if self.shuffle:
            rest = random.permutation(rest)
        for first in range(0, len(rest) - self.batch_size + 1, self.batch_size):
            yield rest[first : first + self.batch_size]


def _lane(blocks: npt.NDArray[np.int64], random: np.random.Generator | None) -> Iterator[Indices]:
    """Yield the views of a lane's blocks, one shuffled buffer at a time."""
    for first in range(0, len(blocks), BUFFER_BLOCKS):
        views = np.concatenate(
            [
                np.arange(start, start + count)
                for start, count in blocks[first : first + BUFFER_BLOCKS]
            ]
        )
        yield random.permutation(views) if random is not None else views
