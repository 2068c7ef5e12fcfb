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
from benchmarks.accuracy.strength import strength_section

PRECISIONS = {"bf16": "bf16", "no": "fp32"}
"""Precisions of runs, as results and as tables name them."""


class Score(NamedTuple):
    """Score of an arm: top-1 in percent by seed, and CPU seconds of training without evaluation.

    The seconds are medians for each precision: runs of different precisions used different
    processors, so their times cannot be compared.
    """

    name: str
    top1: dict[int, float]
    views: int
    cpu_seconds: dict[str, float]
    rate: float
    target_bytes: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1.values())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; not a number for one seed."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else math.nan

    def cell(self) -> str:
        spread = "" if math.isnan(self.spread) else f" ± {self.spread:.1f}"
        return f"{self.mean:.1f}{spread} (n = {len(self.top1)})"

    def gain_over(self, other: "Score") -> str:
        """Mean and standard deviation of the differences, over the seeds that both have.

        If ``other`` has more seeds, its mean over the shared seeds is added.
        """
        shared = [seed for seed in self.top1 if seed in other.top1]
        gains = [self.top1[seed] - other.top1[seed] for seed in shared]
        if other.name == self.name or not gains:
            return ""
        spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
        base = statistics.mean(other.top1[seed] for seed in shared)
        beside = f" over {base:.1f}" if len(shared) < len(other.top1) else ""
        return f"{statistics.mean(gains):+.1f}{spread}{beside}"


def score(arm: Arm, rows: dict[str, dict[str, Any]]) -> Score | None:
    """Return the score of an arm, or ``None`` before its first run."""
    finished = [rows[run.key] for run in arm.runs(range(100)) if run.key in rows]
    if not finished:
        return None
    return Score(
        arm.name,
        {row["run"]["seed"]: row["top1"] for row in finished},
        finished[0]["views"],
        _seconds(finished),
        finished[0]["lr"],
        finished[0]["stage4_bytes_per_view"],
    )


def _seconds(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    by_precision: dict[str, list[float]] = {}
    for row in rows:
        by_precision.setdefault(row["machine"]["precision"], []).append(row["train_cpu_seconds"])
    return {name: statistics.median(seconds) for name, seconds in by_precision.items()}


def accuracy_section(results: Path, images: Path) -> str:
    """Markdown, and pictures beside it; empty before the first result."""
    rows = _read(results / "accuracy.jsonl")
    if not rows:
        return ""
    parts = ["## Accuracy\n", _regime(rows.values())]
    for student in (grid.CNN, grid.VIT):
        parts.append(_main_table(student, rows))
    parts.append(_pictures(rows, images))
    parts += [_group(name, rows) for name in _TITLES]
    measured = results / "teacher_strength.json"
    if measured.exists():
        arms = grid.GROUPS["strength"]
        scores = {arm.name: s for arm in arms if (s := score(arm, rows))}
        parts.append(strength_section(json.loads(measured.read_text()), scores, images))
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
            "deviation over n seeds of weights and order. Gains are differences from the first "
            "row, computed per seed, for the seeds that both rows have. With another 4,000 "
            "images a score would change by about 0.8 points; most rows would change alike, so a "
            "gain changes less. CPU seconds are the time of training with one thread, without "
            "evaluation; those in bf16 and in fp32 are from different processors and cannot be "
            "compared. "
            f"The tables contain {len(rows)} runs ({', '.join(cpus)}; torch {', '.join(torches)}).",
            "",
            "```sh\nmake bench-accuracy\n```\n",
        ]
    )


def _table(scores: Sequence[Score], *, sized: bool = False) -> list[str]:
    precisions = [name for name in PRECISIONS if any(name in s.cpu_seconds for s in scores)]
    head = ["", "top-1, %", "gain", "views"]
    head += [*(f"CPU s, {PRECISIONS[name]}" for name in precisions), "lr"]
    head += ["feature bytes per view"] * sized
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in scores:
        seconds = [
            f"{row.cpu_seconds[name]:.0f}" if name in row.cpu_seconds else "" for name in precisions
        ]
        cells = [row.name, row.cell(), row.gain_over(scores[0]), f"{row.views:,}"]
        cells += [*seconds, f"{row.rate:g}", *[f"{row.target_bytes:,.0f}"] * sized]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _exploration(exploration: dict[str, Any]) -> str:
    lines = [
        "### Exploratory runs\n",
        "The setting and the learning rates were chosen by these runs, one per row, on seed 0. "
        "Loss weights are multiples of the published ones. The caches have 12 passes (48 for 500 "
        "images at 70 px), which repeat in runs with more epochs.\n",
        "| student | px, teacher's | objective | images | epochs | rate | weights |"
        " projectors' rate | top-1, % | training top-1, % |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in exploration["runs"]:
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


def _flops(costs: dict[str, Any]) -> str:
    students = list(costs["gflop"])
    lines = [
        "### Cost of a step with smaller projectors\n",
        "The table shows GFLOP per image, forward and backward, at 224 px, with "
        f"{costs['teacher']} as the teacher (`python -m benchmarks.accuracy.flops`).\n",
        "| | " + " | ".join(students) + " |",
        "| --- |" + " ---: |" * len(students),
    ]
    for name in costs["gflop"][students[0]]:
        cells = []
        for student in students:
            cost, plain = costs["gflop"][student][name], costs["gflop"][student]["no teacher"]
            cells.append(f"{cost:.1f} ({cost / plain:.2f}×)")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _variance(variance: dict[str, Any]) -> str:
    parts = list(next(iter(variance["shares"].values())))
    lines = [
        "### Variance of the targets\n",
        f"The table divides the variance of the unit tokens of `{variance['teacher']}` at "
        f"{variance['img_size'][0]} px (`python -m benchmarks.accuracy.variance`).\n",
        "| | " + " | ".join(parts) + " |",
        "| --- |" + " ---: |" * len(parts),
    ]
    for stage, shares in variance["shares"].items():
        lines.append(f"| {stage} | " + " | ".join(f"{shares[part]:.0%}" for part in parts) + " |")
    return "\n".join([*lines, ""])


_BESIDE = {
    "step_flops.json": _flops,
    "target_variance.json": _variance,
    "accuracy-exploration.json": _exploration,
}


def _scores(group: str, rows: dict[str, dict[str, Any]]) -> list[Score]:
    """Return the scores of the arms of a group that have results."""
    return [s for arm in grid.GROUPS[group] if (s := score(arm, rows))]


def _main_table(student: str, rows: dict[str, dict[str, Any]]) -> str:
    scores = _scores(f"main-{student}", rows)
    if not scores:
        return ""
    return "\n".join([f"### {student}\n", *_table(scores), ""])


_TITLES = {
    "ablation": "Parts of the method",
    "ablation-short": "Parts of the method, short runs",
    "aligned": "Parts of the method on 7 × 7 maps",
    "passes": "How many passes",
    "online": "Cache and live teacher",
    "codec": "What coding costs",
    "budget": "Many coarse passes, or few fine ones",
    "budget-features": "Many coarse passes, or few fine ones, without logits",
    "budget-stage3": "Coarse coding of stage 3",
    "rates": "Rates of the ViT",
    "stage3": "Stage 3 as an extra target",
    "length": "Longer training, and views to reach a score",
}

_QUESTIONS = {
    "ablation": "What does each part add to ScaleKD-light? Gains are relative to ScaleKD-light.",
    "ablation-short": "These rows repeat the comparison, and add the published form, with a quarter"
    " of the views.",
    "aligned": "What does each part add where student and teacher have equally many places? The"
    " student is a ResNet with half the depth and width of ResNet-18 and output stride 8 at 56 px:"
    " its last three levels have 7 × 7 places, like the tokens of the teacher at 98 px. (The"
    " students above have 2 × 2 and 3 × 3 places, and the teacher 5 × 5.) 48 epochs on 24 passes;"
    " the learning rate is that of the other CNN. Gains are relative to ScaleKD-light.",
    "passes": "How many views per image are worth caching? All rows read the same number of views.",
    "online": "Are cached targets as good as those of a live teacher, on the same views?",
    "codec": "How much precision do students need? All rows encode the passes of the first row;"
    " bytes are those of final-stage features, the only features that the objective reads.",
    "budget": "How are bytes best spent? All rows read 48 views of every image. In the first four,"
    " features take about 6 kB an image or fewer; the last two look for the error that costs"
    " accuracy.",
    "budget-features": "The same caches without the KD loss: only the features teach, beside the"
    " labels.",
    "budget-stage3": "Are the tokens before the tail more sensitive to coding? They are an extra"
    " target here, coded like the final ones, in 24 passes; with float16 targets the same students"
    " are the last row of the table of stage 3. Bytes are those of the final stage.",
    "rates": "Which learning rate suits the small ViT? In the last row the weights of the feature"
    " losses add up to about 4, as published for 49 and for 256 tokens. In the other rows they are"
    " 0.08 per token, as published for 49 tokens.",
    "stage3": "Do stage-3 features, as additional targets of the projectors, help beside"
    " final-stage features?",
    "length": "How many views does an objective need to reach a score? The first row is the"
    " student without a teacher after 5,760 views.",
}


def _group(name: str, rows: dict[str, dict[str, Any]]) -> str:
    scores = _scores(name, rows)
    if len(scores) < 2:
        return ""
    head = [f"### {_TITLES[name]}\n", f"{_QUESTIONS[name]}\n"]
    return "\n".join(
        [*head, *_table(scores, sized=name == "codec" or name.startswith("budget")), ""]
    )


def _pictures(rows: dict[str, dict[str, Any]], images: Path) -> str:
    """Draw the scores of the main arms, ablations, passes and codecs."""
    groups = [
        *(f"main-{student}" for student in (grid.CNN, grid.VIT)),
        "ablation",
        "passes",
        "codec",
    ]
    scored = {name: _scores(name, rows) for name in groups}
    drawn = {name: scores for name, scores in scored.items() if scores}
    if not drawn:
        return ""
    figure, axes = plt.subplots(
        len(drawn),
        1,
        figsize=(7, 0.9 * len(drawn) + 0.3 * sum(map(len, drawn.values()))),
        squeeze=False,
        layout="constrained",
        height_ratios=[1 + len(scores) for scores in drawn.values()],
    )
    for panel, (name, scores) in zip(axes[:, 0], drawn.items(), strict=True):
        for row, arm in enumerate(scores):
            panel.plot(list(arm.top1.values()), [row] * len(arm.top1), ".", color="C0", alpha=0.5)
            panel.errorbar(arm.mean, row, xerr=arm.spread, fmt="o", capsize=3, color="C0")
        labels = [arm.name for arm in scores]
        if name == "codec":
            labels = [f"{arm.name}, {arm.target_bytes:,.0f} bytes a view" for arm in scores]
        panel.set_yticks(range(len(scores)), labels)
        panel.invert_yaxis()
        panel.set_title(_TITLES.get(name, name.removeprefix("main-")), loc="left", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("top-1, %: every seed, mean and standard deviation", fontsize=10)
    path = images / "accuracy.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return f"![Top-1 of both students' arms, of parts, by passes and by codec](img/{path.name})\n"
