"""The benchmark without labels: its arms can be built, and its table shows what was measured."""

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy import features
from benchmarks.accuracy.features_table import features_section
from scalekd.distillation import ScaleKDConfig, build_objective
from scalekd.shapes import FeatureShape


def row(arm: str, seed: int, score: float) -> dict[str, Any]:
    return {
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
        if arm.objective != "features" or arm.epochs != 6:
            continue
        objective = build_objective(
            "features",
            ScaleKDConfig(**{"tpp": False, **arm.distillation}),
            student_levels=((16, (3, 3)), (32, (2, 2))),
            teacher_stages={4: shape},
            student_features=32,
        )
        losses[arm.name] = objective.loss_names
    assert losses["summary alone"] == ("summary_loss", "total")
    assert "summary_loss" not in losses["without the summary"]
    assert len({arm.name for arm in features.ARMS}) == len(features.ARMS)


def test_the_table_has_means_spreads_and_times(tmp_path: Path) -> None:
    rows = [row("summary alone", 1, 30), row("summary alone", 2, 32), row("random weights", 1, 20)]
    (tmp_path / "features.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = features_section(tmp_path, tmp_path)
    assert "| random weights | 20.0 | 30.0 | 24,000 | 31 | 1 |" in text
    assert "| summary alone | 31.0 ± 1.4 | 41.0 ± 1.4 | 24,000 | 32 | 2 |" in text
    assert text.index("random") < text.index("summary alone")
    assert "without the summary" not in text
    assert features_section(tmp_path / "none", tmp_path) == ""
