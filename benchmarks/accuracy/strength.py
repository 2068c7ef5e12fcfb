"""Measure the teacher's top-1 on the validation images at each size.

    python -m benchmarks.accuracy.strength

Writes ``benchmarks/results/teacher_strength.json``. Smaller images make a weaker teacher of the
same network, so that students can be compared by the strength of their teacher alone.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.accuracy.grid import ALIGNED_TEACHER_PX, TEACHER_SIZES
from scalekd.evaluation import EvaluationConfig, EvaluationViews, Evaluator
from scalekd.loading import open_images
from scalekd.teachers import TeacherConfig, load_teacher
from scalekd.training.accelerator import make_accelerator

_RESULTS = Path(__file__).parents[1] / "results" / "teacher_strength.json"
_DATA = Path(__file__).parents[3] / "shared" / "data"
_TEACHER = "vit_small_patch14_112_cifar10"


def strength(teacher: str, data_dir: str, px: int) -> tuple[float, int]:
    """Top-1 in percent at one size, and the number of images."""
    loaded = load_teacher(TeacherConfig(model=f"local-dir:{teacher}", img_size=(px, px)))
    views = EvaluationViews(open_images(data_dir, "val"), make_accelerator("auto"), 100)
    result = Evaluator(views, EvaluationConfig.of(loaded.spec)).evaluate(loaded.model)
    return result.top1, result.num_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=_DATA, help="folder with cifar10 and teacher")
    data = parser.parse_args().data
    torch.set_num_threads(1)
    top1, num_images = {}, 0
    for px in sorted({*TEACHER_SIZES, ALIGNED_TEACHER_PX}):
        top1[str(px)], num_images = strength(
            str(data / "teacher" / _TEACHER), str(data / "cifar10"), px
        )
        print(f"{px} px: {top1[str(px)]:.2f} %", flush=True)
    result = {"teacher": _TEACHER, "num_images": num_images, "top1": top1}
    _RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
