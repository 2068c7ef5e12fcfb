"""Division of the shards of a cache among the processes that write it."""

import itertools
from dataclasses import dataclass

from scalekd.cache.writing.writer import CacheWriter
from scalekd.pipelines._processes import Processes


@dataclass(frozen=True)
class Work:
    """Shards for this process.

    Attributes:
        shards: Missing shards of its own share, then those of the others, to take over what is
            left.
        num_views: Number of views of its own missing shards.
        num_committed: Number of shards of its own share that are committed.
    """

    shards: list[tuple[int, int]]
    num_views: int
    num_committed: int


def divide(
    writer: CacheWriter, shards: tuple[int, int] | None, num_passes: int, processes: Processes
) -> Work:
    """Divide the shards among the processes by number.

    On a shared folder, where leases ensure that each shard is written once, a process then takes
    over shards of the others.
    """
    identity = writer.plan.identity
    first, last = shards or (0, identity.num_shards - 1)
    every = [
        (pass_index, shard) for pass_index in range(num_passes) for shard in range(first, last + 1)
    ]
    own = every[processes.index :: processes.count]
    missing = [
        (pass_index, shard)
        for pass_index, group in itertools.groupby(own, key=lambda pair: pair[0])
        for shard in writer.missing(pass_index, [shard for _, shard in group])
    ]
    others = []
    if not writer.is_remote:  # from the end, which their owners reach last
        mine = set(own)
        others = [pair for pair in reversed(every) if pair not in mine]
    num_views = sum(identity.rows_of(shard) for _, shard in missing)
    return Work([*missing, *others], num_views, len(own) - len(missing))
