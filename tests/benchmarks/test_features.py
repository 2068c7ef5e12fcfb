"""The benchmark without labels: its arms can be built, and its table shows what was measured."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.accuracy import features
from benchmarks.accuracy.features_table import features_section
from scalekd.distillation import ScaleKDConfig, build_objective
from scalekd.shapes import FeatureShape


def row(arm: str, seed: int, score: float) -> dict[str, Any]:
    return {
        "table": "short",
        "arm": arm,
        "seed": seed,
        "knn_top1": score,
        "linear_top1": score + 10,
        "views": 24_000,
        "train_cpu_seconds": 30 + seed,
    }


def test_arms_have_different_names_and_losses() -> None:
    shape = FeatureShape((5, 5), 64)
    losses = {}
    for arm in features.ARMS:
        if arm.objective != "features" or arm.table != "short":
            continue
        objective = build_objective(
            "features",
            ScaleKDConfig(**{**arm.distillation, "tpp": False}),
            student_levels=((16, (3, 3)), (32, (2, 2))),
            teacher_stages={4: shape},
            student_features=32,
        )
        losses[arm.name] = objective.loss_names
    assert losses["summary alone"] == ("summary_loss", "total")
    assert "summary_loss" not in losses["attention and tail, no summary"]
    assert len({(arm.table, arm.name) for arm in features.ARMS}) == len(features.ARMS)


def test_fine_tuned_students_start_from_an_arm_that_is_trained() -> None:
    long = {arm.name for arm in features.ARMS if arm.table == "long"}
    few = [arm for arm in features.ARMS if arm.table == "few"]
    assert {arm.start for arm in few} == {"", features.BEST, features.LONGER}
    assert {features.BEST, features.LONGER} <= long
    assert {arm.labels * arm.epochs / arm.longer for arm in few if arm.labels} == {12_000}


def test_labelled_images_are_the_first_of_the_training_images(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10/classes.txt").write_text("cat\ndog\n")
    for shard in range(2):
        with tarfile.open(tmp_path / f"cifar10/train-00000{shard}.tar", "w") as tar:
            for name in (f"{shard}{n}.{suffix}" for n in range(3) for suffix in ("jpg", "cls")):
                member = tarfile.TarInfo(name)
                member.size = len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
    folder = features._labelled(4, tmp_path, tmp_path)
    with tarfile.open(folder / "train-000000.tar") as tar:
        content = {m.name: tar.extractfile(m).read().decode() for m in tar}  # type: ignore[union-attr]
    assert list(content) == [
        f"{key}.{suffix}" for key in ("00", "01", "02", "10") for suffix in ("jpg", "cls")
    ]
    assert all(name == text for name, text in content.items())
    assert (folder / "classes.txt").exists()


def test_the_table_has_means_spreads_and_times(tmp_path: Path) -> None:
    rows = [row("summary alone", 1, 30), row("summary alone", 2, 32), row("random weights", 1, 20)]
    (tmp_path / "features.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = features_section(tmp_path, tmp_path)
    assert "| random weights | 20.0 | 30.0 | 24,000 | 31 | 1 |" in text
    assert "| summary alone | 31.0 ± 1.4 | 41.0 ± 1.4 | 24,000 | 32 | 2 |" in text
    assert text.index("random") < text.index("summary alone")
    assert "no summary" not in text
    assert "### Long runs" not in text
    assert features_section(tmp_path / "none", tmp_path) == ""
