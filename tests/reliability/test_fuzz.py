"""A short run of the fuzzer; ``python -m benchmarks.fuzz_reader`` is the long one."""

import os
import signal

import numpy as np
import pytest

from scalekd.cache.forms import zarr as reader
from tests.reliability import fuzz_reader as fuzzer


def test_mutated_caches_are_read_or_refused_with_our_errors() -> None:
    result = fuzzer.fuzz(600, seed=7, share=0.0)
    assert result["failures"] == []
    assert result["refused"] > 400
    assert result["accepted"] > 20
    assert result["peak_growth_megabytes"] < 500


def test_semantically_changed_caches_are_read_or_refused_with_our_errors() -> None:
    result = fuzzer.fuzz(200, seed=7, share=1.0)
    assert result["failures"] == []
    assert result["refused"] > 60
    assert result["accepted"] > 20
    assert result["peak_growth_megabytes"] < 700


def test_the_fuzzer_detects_planted_errors_crashes_and_excess_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Foreign errors, crashes and memory beyond the limit, each planted in the reader."""
    sound, parent = reader.decode_chunk, os.getpid()

    def foreign(*arguments: object) -> object:
        raise ZeroDivisionError

    def crash(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGKILL)

    def greedy(*arguments: object) -> object:
        np.zeros(1 << 31, np.uint8)
        return sound(*arguments)

    for planted, word in ((foreign, "ZeroDivision"), (crash, "ended with"), (greedy, "Memory")):

        def later(*arguments: object, planted: object = planted) -> object:
            # The subjects are read once in the parent before the first child is forked.
            return planted(*arguments) if os.getpid() != parent else sound(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(reader, "decode_chunk", later)
        result = fuzzer.fuzz(12, seed=1, share=0.0)
        assert word in str(result["failures"])
