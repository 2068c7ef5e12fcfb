"""What the teacher's batch size may change in a cache: its rounding, and nothing else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scalekd.cache import open_cache
from scalekd.cache.layout import SAMPLES

HALF_STEP = 2.0**-11  # of a float16, relative: float32 rounding may tip a value to its neighbour


@pytest.fixture(scope="module")
def pair(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("batch-sizes")
    for size in (7, 64):
        make_cache(folder / str(size), batch_size=size)
    return open_cache(folder / "7"), open_cache(folder / "64")


def test_samples_and_views_are_the_same_bytes(pair: Any) -> None:
    first, second = pair
    for shard in range(first.identity.num_shards):
        assert first.record(SAMPLES, shard).files == second.record(SAMPLES, shard).files
        for unit in range(first.num_passes):
            views, others = first.record(unit, shard).files, second.record(unit, shard).files
            named = [path for path in views if "/view/" in path or "/pixel_hash/" in path]
            assert named
            assert {path: views[path] for path in named} == {path: others[path] for path in named}


@pytest.mark.parametrize("name", ["stage3/values", "stage4/values", "logits/values"])
def test_targets_differ_by_the_teachers_rounding_at_most(name: str, pair: Any) -> None:
    """By one float16 step, or by float32 rounding beside the view's largest value."""
    for unit in range(pair[0].num_passes):
        for first, count in pair[0].blocks():
            one, other = (
                cache.read_rows(unit, first, count, [name])[name].astype(np.float64)
                for cache in pair
            )
            step = 2 * HALF_STEP * np.abs(one)
            floor = 1e-5 * np.abs(one).reshape(count, -1).max(axis=1)
            bound = step + floor.reshape(-1, *(1,) * (one.ndim - 1))
            assert (np.abs(one - other) <= bound).all()


def test_a_cache_is_continued_with_its_own_batch_size_only(pair: Any) -> None:
    assert pair[0].manifest.plan.cache_id != pair[1].manifest.plan.cache_id
