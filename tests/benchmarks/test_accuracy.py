"""The accuracy benchmark: what a light step costs, and a grid that can be left and taken up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import __main__, caches, flops, grid, tables
from scalekd.cache import open_cache
from scalekd.codecs import parse_codec
from scalekd.pipelines import _calibration_views, _write_shards


@pytest.mark.parametrize("student", ["resnet50", "vit_small_patch16_224"])
def test_a_light_step_costs_at_most_two_plain_ones(student: str) -> None:
    plain, published, *_, light = (flops.step_flops(student, form) for form in flops.FORMS.values())
    assert 1.2 * plain < light <= 2 * plain
    assert published > 3 * plain


def _rows(group: str, *, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {
            "key": run.key,
            "run": run._asdict(),
            "top1": (10.0 + seed) * number + seed,
            "lr": 1e-3,
            "views": 100,
            "stage4_bytes_per_view": 0,
            "train_cpu_seconds": 1.0,
            "machine": {"cpu": "a processor", "precision": "bf16"},
            "software": {"torch": "2"},
        }
        for number, arm in enumerate(grid.GROUPS[group])
        for run in arm.runs(seeds)
        for seed in [run.seed]
    ]


def test_every_arm_has_its_own_settings() -> None:
    for arms in grid.GROUPS.values():
        keys = [run.key for arm in arms for run in arm.runs()]
        assert len(set(keys)) == len(keys)
        assert all(len(key) < 200 for key in keys)  # they name files
        for cache in {arm.run.cache for arm in arms} - {"views"}:
            plain = re.sub(r"^\d+x", "", cache).removesuffix("+3")
            assert re.fullmatch(r"passes-\d+|\d+px", cache) or parse_codec(plain)


def test_tables_give_mean_spread_number_and_gain(tmp_path: Path) -> None:
    rows = _rows("main-resnet18-half", seeds=(1, 2, 3))[:5]  # one arm lacks a seed
    results = tmp_path / "accuracy.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tables.accuracy_section(tmp_path, tmp_path)
    assert "| no teacher | 2.0 ± 1.0 (n = 3) |  |" in text
    assert "| logits only | 13.0 ± 1.4 (n = 2) | +11.5 ± 0.7 over 1.5 |" in text  # gains 11 and 12
    assert "vit-tiny-6" not in text  # nothing measured, nothing said
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert tables.accuracy_section(tmp_path / "none", tmp_path) == ""


def test_times_of_one_precision_are_not_mixed_with_those_of_another(tmp_path: Path) -> None:
    rows = _rows("online", seeds=(1, 2, 3))
    for row, seconds in zip(rows, (2, 40, 4, 6, 8, 10), strict=True):
        row |= {"train_cpu_seconds": seconds}
    rows[1]["machine"] = {"cpu": "a slower one", "precision": "no"}
    results = tmp_path / "accuracy.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tables.accuracy_section(tmp_path, tmp_path)
    assert "| views | CPU s, bf16 | CPU s, fp32 | lr |" in text
    assert "| cache | 2.0 ± 1.0 (n = 3) |  | 100 | 3 | 40 | 0.001 |" in text
    assert "| live teacher | 14.0 ± 2.0 (n = 3) | +12.0 ± 1.0 | 100 | 8 |  | 0.001 |" in text


def test_finished_and_claimed_runs_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = __main__
    runs = main.wanted(["online"], 1)
    trained: list[str] = []

    def train(run: Any, *_others: Any) -> dict[str, Any]:
        trained.append(run.key)
        with main.claimed(tmp_path, run) as mine:
            assert not mine
        return {"key": run.key, "top1": 1.0, "train_cpu_seconds": 1.0}

    monkeypatch.setattr(main, "train", train)
    for _ in range(2):
        main.train_missing(runs, main.Results(tmp_path / "r.jsonl"), caches=None, work=tmp_path)
    assert trained == [run.key for run in runs]
    with main.claimed(tmp_path, runs[0]) as mine:
        assert mine


def test_caches_of_another_regime_are_not_used(tmp_path: Path) -> None:

    run = grid.Run(grid.CNN, "kd")
    old = tmp_path / "float16"  # where an earlier version kept them
    small = caches.Caches(tmp_path, data_dir="", teacher="", regime=grid.Regime(5, 4, 4))
    for folder in (old, small.folder / "float16"):
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    assert small.get(run) == small.folder / "float16"
    assert caches.Caches(tmp_path, data_dir="", teacher="").folder not in (tmp_path, small.folder)


def test_caches_of_other_codecs_take_their_values_from_the_first(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = caches.Caches(
        tmp_path, data_dir=str(tiny_images), teacher="", regime=grid.Regime(8, 2, 2)
    )
    here.teacher = caches._NO_TEACHER
    here.get(grid.Run(grid.CNN, "kd"))

    def runs_again(*_arguments: Any) -> None:
        pytest.fail("the teacher runs again")

    for module in (_calibration_views, _write_shards):
        monkeypatch.setattr(module, "run_teacher", runs_again)
    coarse = open_cache(here.get(grid.Run(grid.CNN, "stage3", cache="1xtransform:error=0.1+3")))
    assert (coarse.num_passes, sorted(coarse.codecs.stages)) == (1, [3, 4])


def test_a_cache_named_by_its_size_has_the_teacher_at_that_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(caches, "cache_teacher", asked.append)
    here = caches.Caches(tmp_path, data_dir=str(tmp_path), teacher="there")
    for run in (grid.Run(grid.CNN, "kd", cache="56px"), grid.Run(grid.CNN, "kd")):
        here.get(run)
    sizes = [config.teacher.img_size for config in asked]
    assert sizes == [(56, 56), (grid.TEACHER_PX, grid.TEACHER_PX)]
    assert [config.passes for config in asked] == [grid.SHORT, grid.REGIME.passes]


def test_gains_are_shown_against_the_teachers_strength(tmp_path: Path) -> None:
    rows = _rows("strength", seeds=(1, 2))[:10]  # no teacher, and logits only at all sizes
    (tmp_path / "accuracy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    strengths = {str(px): 80.0 + px / 10 for px in grid.TEACHER_SIZES}
    (tmp_path / "teacher_strength.json").write_text(
        json.dumps({"num_images": 9, "top1": strengths})
    )
    text = tables.accuracy_section(tmp_path, tmp_path)
    # No teacher scores the seed, and the n-th arm (10 + seed) n more.
    assert "| 56 px | 16 | 85.6 | 13.0 ± 1.4 (n = 2) | +11.5 ± 0.7 |" in text
    assert "| 112 px | 64 | 91.2 | 47.5 ± 3.5 (n = 2) | +46.0 ± 2.8 |" in text
    assert "without a teacher: 1.5 ± 0.7 (n = 2) %" in text
    assert (tmp_path / "strength.png").stat().st_size > 1000
