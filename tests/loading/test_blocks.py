"""Blocks are read once while they are in use."""

from typing import Any

import numpy as np
import pytest

from scalekd.cache import CacheReader, open_cache
from scalekd.loading.blocks import BlockReader, gather


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """``(pass, first sample)`` of every block that is read."""
    seen: list[tuple[int, int]] = []
    read_rows = CacheReader.read_rows

    def note(self: CacheReader, pass_index: int, first: int, *rest: Any) -> Any:
        seen.append((pass_index, first))
        return read_rows(self, pass_index, first, *rest)

    monkeypatch.setattr(CacheReader, "read_rows", note)
    return seen


def test_views_are_found_in_any_order_and_across_blocks(recorded: Any) -> None:
    reader = open_cache(recorded.root)
    blocks = BlockReader(reader, ["pixel_hash"])
    everything = np.concatenate(
        [reader.read_rows(1, *extent, ["pixel_hash"])["pixel_hash"] for extent in reader.blocks()]
    )
    wanted = [69, 0, 24, 23, 7, 8, 69]
    out = np.empty(len(wanted), np.uint64)
    gather([blocks.find(1, sample) for sample in wanted], "pixel_hash", out)
    assert np.array_equal(out, everything[wanted])


def test_a_block_is_read_once_while_it_is_kept(recorded: Any, reads: list[tuple[int, int]]) -> None:
    blocks = BlockReader(open_cache(recorded.root), ["pixel_hash"], kept_blocks=2)
    for sample in (0, 8, 1, 9, 2):
        blocks.find(0, sample)
    assert reads == [(0, 0), (0, 8)]
    blocks.find(0, 16)  # a third block: the one longest not asked for goes, the second
    blocks.find(0, 3)
    assert reads == [(0, 0), (0, 8), (0, 16)]
    blocks.find(0, 10)
    assert reads[3:] == [(0, 8)]


def test_passes_are_different_blocks(recorded: Any, reads: list[tuple[int, int]]) -> None:
    blocks = BlockReader(open_cache(recorded.root), ["pixel_hash"])
    first, second = (blocks.find(number, 5)[0]["pixel_hash"] for number in (0, 1))
    assert reads == [(0, 0), (1, 0)]
    assert not np.array_equal(first, second)


def test_another_process_reads_blocks_of_its_own(
    recorded: Any, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = BlockReader(open_cache(recorded.root), ["pixel_hash"])
    before, reader = blocks.find(0, 5), blocks.reader
    monkeypatch.setattr("scalekd.loading.blocks.os.getpid", lambda: -1)
    after = blocks.find(0, 5)
    assert reads == [(0, 0), (0, 0)]
    assert blocks.reader is not reader
    assert np.array_equal(before[0]["pixel_hash"], after[0]["pixel_hash"])
