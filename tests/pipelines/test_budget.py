"""``--budget``: the passes and the error that bytes and hours pay for."""

from pathlib import Path
from typing import Any

import pytest

from scalekd.cache import open_cache
from scalekd.codecs import parse_codec
from scalekd.errors import UsageError
from scalekd.pipelines._budget import (
    MAX_PASSES,
    Budget,
    Price,
    best,
    estimate_budget,
    frontier,
    with_codec,
)
from scalekd.pipelines._job import Job
from scalekd.pipelines._processes import Processes
from scalekd.pipelines.cache_teacher import (
    CacheOrder,
    CacheTeacherConfig,
    cache_teacher,
    write_cache,
)
from scalekd.teachers import TeacherConfig, load_teacher
from tests.conftest import tiny_teacher


@pytest.mark.parametrize(
    ("text", "num_bytes", "hours"),
    [
        ("200GB", 200 * 10**9, None),
        ("1.5 TiB", 3 * 2**39, None),
        ("40h", None, 40.0),
        ("90min", None, 1.5),
        ("3d", None, 72.0),
        ("2GB, 0.5h", 2 * 10**9, 0.5),
    ],
)
def test_a_budget_is_bytes_or_hours(text: str, num_bytes: int | None, hours: float | None) -> None:
    assert Budget.parse(text) == Budget(num_bytes, hours)


@pytest.mark.parametrize("text", ["", "much", "0GB", "0h", "-3GB", "3h,4h", "1GB,2GB", "5 weeks"])
def test_an_invalid_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give bytes on disk"):
        Budget.parse(text)


def _price(error: float, gigabytes: float, hours: float = 1.0, start: float = 0.0) -> Price:
    return Price(f"transform:error={error:g}", error, gigabytes * 1e9, hours, start)


_PRICES = [_price(0.01, 10.0), _price(0.05, 2.0), _price(0.1, 1.0)]


def test_few_bytes_are_spent_on_passes_and_many_on_precision() -> None:
    scarce = best(frontier(Budget(num_bytes=10 * 10**9), _PRICES))
    assert (scarce.codec, scarce.passes) == ("transform:error=0.1", 10)
    ample = best(frontier(Budget(num_bytes=4000 * 10**9), _PRICES))
    assert (ample.codec, ample.passes) == ("transform:error=0.01", MAX_PASSES)
    assert ample.total_bytes == 3000e9


def test_a_choice_satisfies_both_limits() -> None:
    ways = frontier(Budget(20 * 10**9, hours=9.5), [_price(0.05, 2.0, start=0.75)])
    assert [way.passes for way in ways] == [8]  # 8.75 hours; the bytes would pay for 10
    assert ways[0].hours == 8.75


def test_a_codec_that_cannot_pay_for_the_passes_is_left_out() -> None:
    ways = frontier(Budget(num_bytes=9 * 10**9), _PRICES, passes=4)
    assert [(way.codec, way.passes) for way in ways] == [
        ("transform:error=0.05", 4),
        ("transform:error=0.1", 4),
    ]


def test_the_tail_counts_once() -> None:
    price = Price("int8", 0.0, pass_bytes=2e9, pass_hours=1.0, start_hours=0.0, start_bytes=3e9)
    (way,) = frontier(Budget(num_bytes=10 * 10**9), [price])
    assert (way.passes, way.total_bytes) == (3, 9e9)
    with pytest.raises(UsageError, match=r"1 pass with int8: 5\.0 GB"):
        frontier(Budget(num_bytes=5 * 10**9 - 1), [price])


def test_too_small_a_budget_names_the_smallest_cache() -> None:
    with pytest.raises(UsageError, match=r"1 pass with transform:error=0.1: 1.0 GB.*--limit"):
        frontier(Budget(num_bytes=10**9 - 1), _PRICES)


# With a teacher


@pytest.fixture
def options(tiny_images: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "teacher": tiny_teacher(),
        "data_dir": str(tiny_images),
        "output": tmp_path / "cache",
        "workers": 0,
        "limit": 32,
        "shard_size": 32,
    }


def _beside_the_tail(num_bytes: int) -> str:
    tail = load_teacher(tiny_teacher()).tail().state_dict()
    return str(num_bytes + sum(tensor.nbytes for tensor in tail.values()))


def test_an_incomplete_cache_keeps_the_choice_of_its_budget(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = _beside_the_tail(60_000), _beside_the_tail(200_000)
    config = CacheTeacherConfig(**options, budget=small)
    dry, estimate = estimate_budget(config)
    assert not options["output"].exists()
    assert estimate.num_passes == dry.passes
    assert estimate.total_bytes <= 60_000
    result = cache_teacher(config)
    assert result.num_passes == dry.passes >= 2
    assert (
        f"--budget {small}: {dry.passes} passes with --codec {dry.codec}" in capsys.readouterr().err
    )
    cache = open_cache(options["output"])
    assert cache.identity.request["codec"] == str(parse_codec(dry.codec))
    assert cache.manifest.plan.provenance.num_passes == dry.passes

    again = cache_teacher(config.model_copy(update={"budget": large}))
    assert (again.num_passes, again.views_written) == (dry.passes, 0)
    assert "as the cache was begun" in capsys.readouterr().err
    larger = cache_teacher(config.model_copy(update={"budget": large, "overwrite": True}))
    assert larger.num_passes > dry.passes


def test_of_several_tasks_the_first_chooses(options: dict[str, Any]) -> None:
    """Tasks of a Slurm array probe at the same time, and measure other speeds."""
    config = CacheTeacherConfig(**options, budget="1min", passes=2)
    begun = cache_teacher(CacheTeacherConfig(**options, budget=_beside_the_tail(60_000)))
    job, processes = Job.asked(config, Processes().device), Processes()
    codec = str(open_cache(options["output"]).identity.request["codec"])
    late = CacheOrder(begun.num_passes + 2, chosen=True)
    assert write_cache(with_codec(job, codec), late, processes).num_passes == begun.num_passes
    given = cache_teacher(config.model_copy(update={"passes": begun.num_passes + 1}))
    assert given.num_passes == begun.num_passes + 1


def test_options_that_are_given_are_kept(options: dict[str, Any]) -> None:
    large = _beside_the_tail(200_000)
    by_int8, _ = estimate_budget(CacheTeacherConfig(**options, budget=large, codec="int8"))
    assert {way.codec for way in by_int8.ways} == {"int8"}
    two, _ = estimate_budget(CacheTeacherConfig(**options, budget=large, passes=2))
    assert {way.passes for way in two.ways} == {2}
    assert two.codec == "transform:error=0.01"  # bytes are left
    by_time, _ = estimate_budget(CacheTeacherConfig(**options, budget="2d"))
    assert [way.codec for way in by_time.ways] == ["transform:error=0.01,metric=spatial"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_text_that_is_no_budget_stops_before_the_teacher_is_loaded(
    options: dict[str, Any], dry_run: bool
) -> None:
    absent = TeacherConfig(model="test_vit", checkpoint=str(options["output"] / "absent"))
    config = CacheTeacherConfig(**options | {"teacher": absent}, budget="5 weeks")
    with pytest.raises(UsageError, match="--budget 5 weeks: give bytes on disk"):
        estimate_budget(config) if dry_run else cache_teacher(config)


def test_equal_views_are_bought_once(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = CacheTeacherConfig(**options, budget="1TB,99d", aug="center")
    choice, _ = estimate_budget(config)
    assert (choice.passes, choice.codec) == (1, "transform:error=0.01")
    assert cache_teacher(config).num_passes == 1
    twice = CacheTeacherConfig(**options | {"overwrite": True}, passes=2, aug="center")
    assert "one pass" not in capsys.readouterr().err
    cache_teacher(twice)
    assert "--passes 2: all views that center draws" in capsys.readouterr().err


def test_a_codec_that_is_given_has_its_error(options: dict[str, Any]) -> None:
    def loss(**changes: Any) -> float:
        choice, _ = estimate_budget(
            CacheTeacherConfig(**options, budget="9" * 400 + "h", **changes)
        )
        assert choice.passes == MAX_PASSES
        return choice.ways[0].expected_loss

    assert loss() == pytest.approx(9 / 300 + 5 * 0.01)
    assert loss(codec="transform:error=0.1") == pytest.approx(9 / 300 + 5 * 0.1)
    assert loss(codec="int8") == pytest.approx(9 / 300)


def test_too_small_a_budget_stops_before_anything_is_written(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"smallest cache costs more \(1 pass with transform"):
        cache_teacher(CacheTeacherConfig(**options, budget="1kB"))
    assert not options["output"].exists()
