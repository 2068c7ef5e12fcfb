"""The speed benchmark measures what it says it does, on inputs small enough for every run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed import (
    _formats,
    _formats_child,
    _measure,
    _training,
    compare,
    encoding,
    growth,
    profiles,
    scheduling,
    tables,
)
from scalekd.cache import TargetDecoder
from scalekd.cache.codecs import CacheCodecs
from scalekd.codecs import create_logit_codec, fit_codec
from scalekd.shapes import FeatureShape
from scalekd.teachers import TeacherConfig, load_teacher


@pytest.mark.filterwarnings(
    # webdataset leaves its tars open where a reader stops early.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
@pytest.mark.parametrize(
    "name",
    [
        "scalekd float16",
        ".pt a sample",
        ".npz a sample",
        "zarr, default layout",
        "webdataset, a member an array",
    ],
)
def test_every_form_gives_back_what_was_written(name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((150, 5, 8)).astype(np.float16)
    logits = random.standard_normal((150, 3)).astype(np.float16)
    form = _formats.FORMS[name](tmp_path, len(features))
    form.prepare(features)
    form.write(features, logits)
    form.open()
    for order in ("sequential", "shuffled"):
        _formats_child.check(form, order, features, logits)
        found = [row.tobytes() for _, scores in form.batches(order) for row in scores]
        assert len(found) == len(set(found))
        assert set(found) <= {row.tobytes() for row in logits}
        assert len(found) >= 128  # our own loader makes whole batches
    with pytest.raises(RuntimeError, match="other views"):
        _formats_child.check(form, "sequential", features + 1, logits)


def test_a_cache_of_any_size_is_written_and_read(tmp_path: Path) -> None:
    growth.write(tmp_path / "cache", 700)
    found = growth.read(tmp_path / "cache")
    assert found["read_us_per_view"] > 0
    assert found["resident_bytes_more"] < 200e6


def test_a_cached_and_an_online_step_do_the_same_work() -> None:
    teacher = load_teacher(TeacherConfig(model="test_vit", pretrained=False, img_size=(32, 32)))
    codec = fit_codec("float16", teacher.spec.stages[4])
    logits = create_logit_codec("full", teacher.spec.num_classes or 0)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8))
    said = teacher(pixels)
    batch = {"pixels": pixels, "teacher_pixels": pixels, "label": torch.arange(4)}
    for group, made, values in (
        ("stage4", codec, said.features[4]),
        ("logits", logits, said.logits),
    ):
        planes = made.tensors(made.encode(values.numpy()))
        batch |= {f"{group}.{name}": plane for name, plane in planes.items()}
    decoder = TargetDecoder(CacheCodecs({4: codec}, logits), features=True, logits=True)
    steps = _training.make_steps(
        "test_resnet", img_size=32, teacher=teacher, decoder=decoder, batch=batch, update=False
    )
    assert torch.allclose(steps.cached(), steps.online(), rtol=1e-3)
    assert steps.teacher() is not None


def test_scheduling_is_measured_with_the_shipped_pipeline(tmp_path: Path) -> None:
    found = scheduling.measure(tmp_path / "cache", 32, 512, 0.1, num_threads=4, shard_size=256)
    assert found["seconds"] > found["bare_seconds"] > 0
    assert found["over_bare"] == found["seconds"] / found["bare_seconds"]
    assert found["steady_over_bare"] > 0


def test_the_host_of_a_gpu_writes_what_was_encoded_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    codec = fit_codec("float16", FeatureShape((2, 2), 8))
    encode = type(codec).encode

    def counted(self: Any, features: np.ndarray) -> dict[str, np.ndarray]:
        encoded.append(len(features))
        return encode(self, features)

    monkeypatch.setattr(type(codec), "encode", counted)
    features = np.random.default_rng(0).standard_normal((128, 4, 8), dtype=np.float32)
    settings = _measure.Settings(quick=True, data=tmp_path, work=tmp_path)
    cost = encoding.host_cost(settings, "test", codec, features)
    assert encoded == [128]  # beforehand, and not while it is measured
    assert cost["cpu_us"] > 0
    assert 64 < cost["bytes"] < 64 + 2000 + 1000  # float16, at most; logits; the rest of a view


def test_two_releases_are_compared_figure_by_figure() -> None:
    def run(value: float) -> dict[str, Any]:
        both = {"write": {"cpu": value}, "draw_and_write": {"cpu": 2 * value}}
        times = {name: {"cpu_us": 1e3 * value} for name in ("write", "cached", "online", "with")}
        step = {"cached_over_online": value, "per_view": times}
        loader = {"rate_with_over_without": value, "per_view": times}
        return {
            "cache_teacher": {"over_forward": both, "per_view": times},
            "step": {"students": {"resnet18": step, "vit_tiny_patch16_224": step}},
            "loader": {"sets": {compare.CIFAR: loader, compare.PHOTOGRAPHS: loader}},
        }

    rows = compare.rows({"rows": compare.compared([run(1.0)], [run(1.5), run(1.1), run(9.0)])})
    assert rows[0] == [
        "caching decoded views / forward",
        "1.000 (1.000 to 1.000)",
        "1.500 (1.100 to 9.000)",
    ]
    assert rows[1][1] == "2.000 (2.000 to 2.000)"
    assert rows[2] == [
        "caching decoded views, µs per view",
        "1,000 (1,000 to 1,000)",
        "1,500 (1,100 to 9,000)",
    ]


def test_arms_take_turns() -> None:
    called: list[str] = []
    costs = _measure.take_turns(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3
    )
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"
    assert [len(found) for found in costs.values()] == [3, 3]


def test_a_ratio_is_computed_for_each_turn() -> None:
    """A load that trebles one turn of both arms leaves their ratio alone."""
    cost = _measure.Cost
    slow = [cost(wall=2.0, cpu=2.0, thread=0), cost(6.0, 6.0, 0), cost(2.2, 2.2, 0)]
    fast = [cost(wall=1.0, cpu=1.0, thread=0), cost(3.0, 3.0, 0), cost(1.0, 1.0, 0)]
    assert _measure.median_ratio(slow, fast, "cpu") == 2.0


def test_work_in_threads_counts_as_processor_time() -> None:
    import threading

    def spin() -> None:
        numbers = np.arange(100_000)
        for _ in range(200):
            np.sqrt(numbers)

    def work() -> None:
        thread = threading.Thread(target=spin)
        thread.start()
        thread.join()

    cost = _measure.measured(work)
    assert cost.cpu > 2 * cost.thread


def test_samples_of_a_profile_are_sorted_by_their_innermost_known_frame() -> None:
    run = "main (cli/main.py:3);train_student (pipelines/train_student.py:70)"
    found = profiles.sort_samples(
        "\n".join(
            [
                "main (cli/main.py:3);<module> (scalekd/training/__init__.py:1) 40",
                f"{run};<module> (<frozen importlib._bootstrap>:1) 5",
                f"{run};_update (scalekd/training/trainer.py:9);_single (torch/optim/adam.py:4) 30",
                f"{run};_decode_pcodec (scalekd/cache/forms/chunks.py:200) 10",
                f"{run};_train_epoch (scalekd/training/trainer.py:90) 10",
                "cache_teacher (pipelines/cache_teacher.py:7);calibrate (pipelines/_calibrate.py:9)"
                ";forward (scalekd/teachers/teacher.py:3) 200",
            ]
        )
    )
    assert found["shares"] == {"optimiser": 0.6, "entropy coding": 0.2}
    assert found["other"] == {"_train_epoch (scalekd/training/trainer.py)": 0.2}
    assert found["other_share"] == 0.2
    assert (found["start_up_seconds"], found["calibration_seconds"]) == (0.45, 2.0)


def test_figures_of_the_document_are_those_of_the_results() -> None:
    where = {
        "date": "2026-01-02",
        "processor": "a processor",
        "cores": 2,
        "load_average": [0.1, 0.2],
        "python": "3.11",
        "software": {"torch": "2.9"},
        "command": "python -m benchmarks.speed --only growth",
    }
    row = {
        "views": 12_345,
        "open_seconds": 0.0021,
        "sample_table_seconds": 0.5,
        "first_batch_order_seconds": 0.003,
        "read_us_per_view": 7.25,
        "write_us_per_view": 51,
        "resident_bytes_more": 6_100_000,
        "bytes_per_view": 85,
    }
    growth = {"rows": [row], "batches": 100, "batch_size": 64, "quick": False, "environment": where}
    text = tables.markdown({"growth": growth})
    assert "| 12,345 | 2.1 | 500 | 3.0 | 7.2 | 51 | 6.1 | 85 |" in text
    assert "2026-01-02, a processor, 2 cores, load 0.1 before and 0.2 after" in text
    assert "quick form" not in text


def test_quick_figures_fill_in_for_missing_full_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "markdown", lambda found: repr(sorted(found.items())))
    quick, full = {"step": "quick", "growth": "quick"}, {"growth": "full"}
    assert tables.speed_section(tmp_path, tmp_path) == ""
    (tmp_path / "speed-quick.json").write_text(json.dumps(quick))
    assert tables.speed_section(tmp_path, tmp_path) == repr(sorted(quick.items()))
    (tmp_path / "speed.json").write_text(json.dumps(full))
    expected = [("growth", "full"), ("step", "quick")]
    assert tables.speed_section(tmp_path, tmp_path) == repr(expected)
