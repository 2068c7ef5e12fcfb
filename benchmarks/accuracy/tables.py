"""The accuracy section of ``docs/benchmarks.md``."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.accuracy import grid
from benchmarks.accuracy.grid import Arm


class Score(NamedTuple):
    """An arm: top-1 in percent by seed, CPU seconds of training without evaluation."""

    name: str
    top1: dict[int, float]
    views: int
    cpu_seconds: float
    rate: float
    target_bytes: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1.values())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; none for one seed."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else math.nan

    def cell(self) -> str:
        spread = "" if math.isnan(self.spread) else f" ± {self.spread:.1f}"
        return f"{self.mean:.1f}{spread} (n = {len(self.top1)})"

    def gain_over(self, other: "Score") -> str:
        """Mean and standard deviation of the differences, over the seeds that both have."""
        gains = [self.top1[seed] - other.top1[seed] for seed in self.top1 if seed in other.top1]
        if other.name == self.name or not gains:
            return ""
        spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
        return f"{statistics.mean(gains):+.1f}{spread}"


def score(arm: Arm, rows: dict[str, dict[str, Any]]) -> Score | None:
    """An arm's score, or none before its first run."""
    found = [rows[run.key] for run in arm.runs(range(100)) if run.key in rows]
    if not found:
        return None
    return Score(
        arm.name,
        {row["run"]["seed"]: row["top1"] for row in found},
        found[0]["views"],
        statistics.median(row["train_cpu_seconds"] for row in found),
        found[0]["lr"],
        found[0]["stage4_bytes_per_view"],
    )


def accuracy_section(results: Path, images: Path) -> str:
    """Markdown, and pictures beside it; empty before the first result."""
    rows = _read(results / "accuracy.jsonl")
    if not rows:
        return ""
    parts = ["## Accuracy\n", _regime(rows.values())]
    for student in grid.STUDENTS:
        parts.append(_main_table(student, rows))
    parts.append(_pictures(rows, images))
    parts += [_group(name, rows) for name in _TITLES]
    parts += [
        make(json.loads((results / name).read_text()))
        for name, make in _BESIDE.items()
        if (results / name).exists()
    ]
    return "\n".join(part for part in parts if part)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["key"]: row for row in rows}


def _regime(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    cpus = sorted({row["machine"]["cpu"] for row in rows})
    torches = sorted({row["software"]["torch"] for row in rows})
    text = grid.__doc__ or ""
    return "\n".join(
        [
            text.split("\n\n", 1)[1],
            "Scores are top-1 on 4,000 validation images after the last epoch: mean ± standard "
            "deviation over n seeds of weights and order. Gains are over the first row, seed by "
            "seed, over the seeds that both have. One score has a sampling error of about 0.8 "
            "points, which all arms share. CPU seconds are those of training, one thread, without "
            f"evaluation. {len(rows)} runs; {', '.join(cpus)}; torch {', '.join(torches)}.",
            "",
            "```sh\nmake bench-accuracy\n```\n",
        ]
    )


def _table(scores: Sequence[Score], *, sized: bool = False) -> list[str]:
    head = ["", "top-1, %", "gain", "views", "CPU s", "lr"]
    head += ["feature bytes a view"] * sized
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for found in scores:
        gain = found.gain_over(scores[0])
        lines.append(
            f"| {found.name} | {found.cell()} | {gain} | {found.views:,} |"
            f" {found.cpu_seconds:.0f} | {found.rate:g} |" + f" {found.target_bytes:,.0f} |" * sized
        )
    return lines


def _exploration(found: dict[str, Any]) -> str:
    lines = [
        "### Exploratory runs\n",
        "One run each on seed 0, by which regime and rates were chosen. Weights are multiples of "
        "the published ones; 12 passes (48 of 500 images at 70 px), repeated if epochs are more.\n",
        "| student | px, teacher's | objective | images | epochs | rate | weights |"
        " projectors' rate | top-1, % | training top-1, % |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in found["runs"]:
        features = run["objective"].startswith("scalekd")
        objective = run["objective"] + " and stage 3" * run["stage3_target"]
        lines.append(
            f"| {run['student']} | {run['student_px']}, {run['teacher_px']} | {objective} |"
            f" {run['images']:,} | {run['epochs']} | {run['lr']:g} |"
            f" {run['weights'] if features else ''} |"
            f" {'× ' + str(run['projector_lr_ratio']) if features else ''} | {run['top1']:.1f} |"
            f" {run['train_top1']:.0f} |"
        )
    return "\n".join([*lines, ""])


def _flops(found: dict[str, Any]) -> str:
    students = list(found["gflop"])
    lines = [
        "### What a light step costs\n",
        f"GFLOP of one image, forward and backward, at 224 px, taught by {found['teacher']} "
        "(`python -m benchmarks.accuracy.flops`).\n",
        "| | " + " | ".join(students) + " |",
        "| --- |" + " ---: |" * len(students),
    ]
    for name in found["gflop"][students[0]]:
        cells = []
        for student in students:
            cost, plain = found["gflop"][student][name], found["gflop"][student]["no teacher"]
            cells.append(f"{cost:.1f} ({cost / plain:.2f}×)")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _variance(found: dict[str, Any]) -> str:
    parts = list(next(iter(found["shares"].values())))
    lines = [
        "### What the targets say\n",
        f"Variance of the unit tokens of `{found['teacher']}` at {found['img_size'][0]} px "
        "(`python -m benchmarks.accuracy.variance`).\n",
        "| | " + " | ".join(parts) + " |",
        "| --- |" + " ---: |" * len(parts),
    ]
    for stage, shares in found["shares"].items():
        lines.append(f"| {stage} | " + " | ".join(f"{shares[part]:.0%}" for part in parts) + " |")
    return "\n".join([*lines, ""])


_BESIDE = {
    "step_flops.json": _flops,
    "target_variance.json": _variance,
    "accuracy-exploration.json": _exploration,
}


def _main_table(student: str, rows: dict[str, dict[str, Any]]) -> str:
    scores = [found for arm in grid.GROUPS[f"main-{student}"] if (found := score(arm, rows))]
    if not scores:
        return ""
    return "\n".join([f"### {student}\n", *_table(scores), ""])


_TITLES = {
    "ablation": "Parts of the method",
    "passes": "How many passes",
    "online": "Cache and live teacher",
    "codec": "What coding costs",
    "stage3": "Stage 3 as an extra target",
    "length": "Longer training, and views to reach a score",
}


def _group(name: str, rows: dict[str, dict[str, Any]]) -> str:
    scores = [found for arm in grid.GROUPS[name] if (found := score(arm, rows))]
    if len(scores) < 2:
        return ""
    return "\n".join([f"### {_TITLES[name]}\n", *_table(scores, sized=name == "codec"), ""])


def _pictures(rows: dict[str, dict[str, Any]], images: Path) -> str:
    panels = [
        (student, found)
        for student in grid.STUDENTS
        if (found := [s for arm in grid.GROUPS[f"main-{student}"] if (s := score(arm, rows))])
    ]
    if not panels:
        return ""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for panel, (student, scores) in zip(axes[0], panels, strict=True):
        for place, found in enumerate(scores):
            panel.errorbar(
                found.cpu_seconds,
                found.mean,
                yerr=found.spread,
                fmt="o",
                capsize=3,
                color=f"C{place}",
                label=found.name,
            )
        panel.set(title=student, xlabel="CPU seconds of training", ylabel="top-1, %")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    most = max(axes[0], key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    figure.legend(
        *most.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center"
    )
    path = images / "accuracy.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return f"![Accuracy against training time](img/{path.name})\n"
