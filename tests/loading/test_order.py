"""The order of an epoch: each view at most once, divided evenly, resumable, reproducible."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd.loading.order import EpochOrder, even_workers


def _blocks(sizes: list[int]) -> tuple[tuple[int, int], ...]:
    starts = np.cumsum([0, *sizes]).tolist()
    return tuple(zip(starts, sizes, strict=False))


_CACHES = st.lists(st.integers(1, 9), max_size=60).map(_blocks)


def _epoch(order: EpochOrder, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in order.batches(epoch, start=start)]


@given(_CACHES, st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_ranks_share_an_epoch_without_overlap_or_loss(
    blocks: Any, batch_size: int, world_size: int, epoch: int, shuffle: bool
) -> None:
    num_views = sum(count for _, count in blocks)
    seen: list[int] = []
    for rank in range(world_size):
        order = EpochOrder(blocks, batch_size, 5, rank=rank, world_size=world_size, shuffle=shuffle)
        batches = _epoch(order, epoch)
        assert len(batches) == order.num_batches == num_views // (batch_size * world_size)
        assert all(len(batch) == batch_size for batch in batches)
        seen += itertools.chain.from_iterable(batches)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(num_views))


@given(_CACHES, st.integers(1, 5), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_starting_in_the_middle_gives_the_rest_of_the_epoch(
    blocks: Any, batch_size: int, start: int
) -> None:
    order = EpochOrder(blocks, batch_size, 1, rank=1, world_size=2)
    assert _epoch(order, 4, start) == _epoch(order, 4)[start:]


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    blocks = _blocks([8] * 40)
    base = _epoch(EpochOrder(blocks, 10, seed=0), 0)
    assert _epoch(EpochOrder(blocks, 10, seed=0), 0) == base
    assert _epoch(EpochOrder(blocks, 10, seed=1), 0) != base
    assert _epoch(EpochOrder(blocks, 10, seed=0), 1) != base


def test_no_view_is_left_out_of_all_epochs() -> None:
    """23 views in batches of 5 leave three over; other ones each time."""
    order = EpochOrder(_blocks([8, 8, 7]), 5, seed=0)
    seen = set()
    for epoch in range(12):
        views = set(itertools.chain.from_iterable(_epoch(order, epoch)))
        assert len(views) == 20
        seen |= views
    assert seen == set(range(23))


def test_a_batch_mixes_views_of_distant_blocks() -> None:
    """A buffer of four shuffled blocks: a batch of 16 drawn from one block would be no shuffle."""
    order = EpochOrder(_blocks([16] * 64), 16, seed=0)
    blocks_per_batch = [len({view // 16 for view in batch}) for batch in _epoch(order)]
    assert np.mean(blocks_per_batch) > 2.5


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_a_block_is_decoded_by_one_worker_in_a_large_cache(num_workers: int) -> None:
    """Workers take batches in turn. Blocks seen by two are decoded twice: at most one in ten."""
    order = EpochOrder(_blocks([16] * 512), 16, seed=0)
    users: dict[int, set[int]] = {}
    for number, batch in enumerate(_epoch(order)):
        for view in batch:
            users.setdefault(view // 16, set()).add(number % num_workers)
    assert sum(len(workers) - 1 for workers in users.values()) <= 51


def test_unshuffled_batches_come_as_stored() -> None:
    order = EpochOrder(_blocks([4, 4, 3]), 3, seed=0, shuffle=False)
    assert _epoch(order) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_cache_smaller_than_a_batch_has_none() -> None:
    for blocks in (_blocks([]), _blocks([3]), _blocks([1, 1, 1])):
        order = EpochOrder(blocks, 4, seed=0)
        assert order.num_batches == 0
        assert _epoch(order) == []


def test_workers_that_share_lanes_evenly() -> None:
    assert [even_workers(n) for n in range(10)] == [0, 1, 2, 2, 4, 4, 4, 4, 8, 8]
    assert [even_workers(n) for n in (14, 16, 23, 24)] == [8, 16, 16, 24]
