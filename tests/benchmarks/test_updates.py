"""An update waits for nothing: the goals of `benchmarks/speed/updates.py`, counted in small."""

import pytest

from benchmarks.speed import updates


def test_an_update_reads_nothing_and_agrees_once_in_ten() -> None:
    reads, agreements = updates.count(30)
    assert reads == 0
    assert agreements == pytest.approx(0.1)  # at 10, 20 and 30
