"""The number of blocks in memory: one per thread, within a limit of bytes."""

from pathlib import Path

import pytest

from scalekd.cache.cache import Cache
from scalekd.cache.writing import writer
from scalekd.cache.writing.writer import CacheWriter, blocks_in_flight


def test_each_thread_may_have_a_block_if_memory_allows(
    cache_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(cache_copy)
    assert [blocks_in_flight(cache.layout, n) for n in (1, 2, 4, 9, 16)] == [4, 4, 4, 9, 16]
    values = sum(a.values_per_view for a in cache.layout.views if a.per_block)
    block_bytes = 4 * values * cache.identity.block_size
    assert block_bytes > 0
    monkeypatch.setattr(writer, "_BYTES_IN_FLIGHT", 6 * block_bytes + 1)
    assert [blocks_in_flight(cache.layout, n) for n in (2, 5, 16)] == [4, 5, 6]
    identity = cache.identity
    with CacheWriter(cache, num_threads=16) as opened:
        views = 6 * identity.block_size + 2 * identity.batch_size + 16 * 32
        assert opened.in_flight.most == views
    monkeypatch.setattr(writer, "_BYTES_IN_FLIGHT", block_bytes)
    assert blocks_in_flight(cache.layout, 16) == 4
