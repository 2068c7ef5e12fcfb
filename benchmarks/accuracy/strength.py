"""The teacher's top-1 on the validation images at each size, and what students gain from it.

    python -m benchmarks.accuracy.strength

Writes ``benchmarks/results/teacher_strength.json``. Smaller images make a weaker teacher of the
same network, so that students can be compared by the strength of their teacher alone. They also
make fewer tokens: 16, 25, 36 and 64 at 56, 70, 84 and 112 px.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from benchmarks.accuracy.grid import TEACHER_SIZES
from scalekd.evaluation import EvaluationConfig, EvaluationViews, Evaluator
from scalekd.loading import open_images
from scalekd.teachers import TeacherConfig, load_teacher
from scalekd.training.accelerator import make_accelerator

if TYPE_CHECKING:
    from benchmarks.accuracy.tables import Score

_RESULTS = Path(__file__).parents[1] / "results" / "teacher_strength.json"
_DATA = Path(__file__).parents[3] / "shared" / "data"
_TEACHER = "vit_small_patch14_112_cifar10"


def strength(teacher: str, data_dir: str, px: int, limit: int | None) -> tuple[float, int]:
    """Top-1 in percent at one size, and the number of images."""
    loaded = load_teacher(TeacherConfig(model=f"local-dir:{teacher}", img_size=(px, px)))
    views = EvaluationViews(
        open_images(data_dir, "val").limited(limit), make_accelerator("auto"), 100
    )
    result = Evaluator(views, EvaluationConfig.of(loaded.spec)).evaluate(loaded.model)
    return result.top1, result.num_samples


def strength_section(
    measured: Mapping[str, Any], scores: Mapping[str, "Score"], images: Path
) -> str:
    """Table and plot of students' gains against the teacher's top-1.

    Args:
        measured: Content of ``teacher_strength.json``.
        scores: Scores of the arms of the grid's group, by name.
        images: Folder of the plot.
    """
    alone = scores.get("no teacher")
    objectives = [
        name
        for name in ("logits only", "ScaleKD-light")
        if any(f"{name}, {px} px" in scores for px in TEACHER_SIZES)
    ]
    if alone is None or not objectives:
        return ""
    head = ["teacher's images", "tokens", "teacher's top-1, %"]
    head += [text for name in objectives for text in (f"{name}, top-1, %", "gain")]
    lines = [
        "### Gain and the teacher's strength\n",
        "Does a stronger teacher give a larger gain? The teacher is one network at four image "
        "sizes; its top-1 is that on "
        f"{measured['num_images']:,} validation images. Students train for 48 epochs on 24 "
        "passes of the same views. Gains are relative to the student without a teacher: "
        f"{alone.cell()} %.\n",
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
    ]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for px in TEACHER_SIZES:
        cells = [f"{px} px", str((px // 14) ** 2), f"{measured['top1'][str(px)]:.1f}"]
        for name in objectives:
            score = scores.get(f"{name}, {px} px")
            cells += ["", ""] if score is None else [score.cell(), score.gain_over(alone)]
        lines.append("| " + " | ".join(cells) + " |")
    for number, name in enumerate(objectives):
        means = []
        for px in TEACHER_SIZES:
            score = scores.get(f"{name}, {px} px")
            shared = set() if score is None else score.top1.keys() & alone.top1.keys()
            if score is None or not shared:
                continue
            gains = [score.top1[seed] - alone.top1[seed] for seed in sorted(shared)]
            x = measured["top1"][str(px)]
            axes.plot([x] * len(gains), gains, ".", color=f"C{number}", alpha=0.5)
            means.append((x, sum(gains) / len(gains)))
        axes.plot(*zip(*means, strict=True), "o-", color=f"C{number}", label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("teacher's top-1, %")
    axes.set_ylabel("student's gain, points")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(images / "strength.png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    caption = "Gain of students against the teacher's top-1: every seed, and the mean"
    return "\n".join([*lines, "", f"![{caption}](img/strength.png)\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=_DATA, help="folder with cifar10 and teacher")
    parser.add_argument("--limit", type=int, help="only the first images")
    arguments = parser.parse_args()
    data = arguments.data
    torch.set_num_threads(1)
    top1, num_images = {}, 0
    for px in TEACHER_SIZES:
        top1[str(px)], num_images = strength(
            str(data / "teacher" / _TEACHER), str(data / "cifar10"), px, arguments.limit
        )
        print(f"{px} px: {top1[str(px)]:.2f} %", flush=True)
    result = {"teacher": _TEACHER, "num_images": num_images, "top1": top1}
    _RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
