"""Transfer pre-trained students to other classes. A finished run is a line of the results.

    python -m benchmarks.transfer                # about two hours of one core
    python -m benchmarks.transfer --seeds 3 --arm "no teacher"
    python -m benchmarks.transfer --dev          # seed 0, on images of no test
    python -m benchmarks.transfer --table        # of the results so far

A finished run is not repeated.
"""

import argparse
import copy
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.transfer import setting
from benchmarks.transfer.data import HELD_OUT, write_image_sets
from benchmarks.transfer.pretraining import Pretrained, Room, pretrain
from benchmarks.transfer.scenes import Scenes, compose
from benchmarks.transfer.segmentation import Segmenter, segment
from benchmarks.transfer.setting import Arm
from benchmarks.transfer.tables import table
from scalekd.evaluation import EvaluationViews, evaluate_linear_probe, evaluate_neighbours
from scalekd.loading import open_images
from scalekd.training.accelerator import make_accelerator
from scalekd.training.precision import choose_precision

_RESULTS = Path(__file__).parents[1] / "results" / "transfer.jsonl"
_DATA = Path(__file__).parents[3] / "shared" / "data"  # beside the repository
_SHARE_OF_TRAINING = 0.6  # of the photographs, by name; the others are in the test's scenes


def scenes_of(
    split: str, images: Path, photographs: Path, counts: Mapping[str, int] = setting.SCENES
) -> tuple[Scenes, Scenes]:
    """Compose the scenes of training, and those of a test on ``split``."""
    files = sorted(photographs.glob("*.JPEG"))
    number = round(_SHARE_OF_TRAINING * len(files))

    def composed(name: str, backgrounds: list[Path], count: int, seed: int) -> Scenes:
        folders = [images / "transfer" / name / label for label in sorted(HELD_OUT)]
        return compose([sorted(f.iterdir()) for f in folders], backgrounds, count, seed=seed)

    training = composed("train", files[:number], counts["train"], 1)
    return training, composed(split, files[number:], counts["test"], 2)


def transfer(
    student: Pretrained, seed: int, *, split: str, images: Path, scenes: tuple[Scenes, Scenes]
) -> dict[str, float]:
    """Measure what a student is worth on the other classes."""
    accelerator = make_accelerator("no")
    data = str(images / "transfer")
    queries, gallery = (
        EvaluationViews(open_images(data, name), accelerator, 128) for name in (split, "train")
    )
    k = min(20, len(gallery.images))
    neighbours = evaluate_neighbours(student.model, queries, gallery, student.view, k=k)
    linear = evaluate_linear_probe(student.model, queries, gallery, student.view)
    scores = {"knn_top1": neighbours.knn_top1, "linear_top1": linear.linear_top1}
    if student.backbone is None:
        return scores
    for name, options in (("frozen", setting.FROZEN), ("fine_tuned", setting.FINE_TUNED)):
        torch.manual_seed(seed)
        backbone = copy.deepcopy(student.backbone)
        model = Segmenter(backbone, len(HELD_OUT) + 1, frozen=name == "frozen")
        found = segment(
            model, *scenes, epochs=int(options["epochs"]), rate=options["rate"], seed=seed
        )
        scores |= {f"{name}_{measure}": value for measure, value in found.items()}
    return scores


def row_of(arm: Arm, seed: int, student: Pretrained, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return a line of the results."""
    return {
        "arm": arm.name,
        "seed": seed,
        "objective": arm.objective,
        "teacher": arm.teacher,
        "distillation": dict(arm.distillation),
        "views": student.views,
        "train_cpu_seconds": student.cpu_seconds,
        "own_top1": student.own_top1,
        **scores,
        "software": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"precision": choose_precision("auto"), "threads": torch.get_num_threads()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=_DATA, help="cifar10, teacher, imagenet-sample"
    )
    parser.add_argument("--work", type=Path, default=Path("output/transfer"), help="for caches")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arm", action="append", choices=[a.name for a in setting.ARMS])
    parser.add_argument("--dev", action="store_true", help="seed 0, tested on images of no test")
    parser.add_argument("--table", action="store_true", help="print the table and end")
    arguments = parser.parse_args()
    default = arguments.work / "dev.jsonl" if arguments.dev else _RESULTS
    results = arguments.results or default
    if arguments.table:
        print("\n".join(table(read(results))))
        return
    teacher = arguments.data / "teacher" / setting.TEACHER
    photographs = arguments.data / "imagenet-sample"
    for folder in (arguments.data / "cifar10", teacher, photographs):
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}; give the folder of the data with --data")
    torch.set_num_threads(1)
    images = arguments.work / "images"
    write_image_sets(arguments.data / "cifar10", images)
    room = Room(images, teacher, arguments.work)
    split = "dev" if arguments.dev else "val"
    scenes = scenes_of(split, images, photographs)
    results.parent.mkdir(parents=True, exist_ok=True)
    for seed in [0] if arguments.dev else range(1, arguments.seeds + 1):
        for arm in setting.ARMS:
            done = {(row["arm"], row["seed"]) for row in read(results)}
            if arm.name not in (arguments.arm or [arm.name]) or (arm.name, seed) in done:
                continue
            if arm.objective == "teacher" and seed > 1:  # has no seed
                continue
            student = pretrain(arm, seed, room)
            scores = transfer(student, seed, split=split, images=images, scenes=scenes)
            row = row_of(arm, seed, student, scores)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            numbers = " ".join(f"{name} {value:.1f}" for name, value in scores.items())
            print(f"{arm.name}, seed {seed}: {numbers}, {student.cpu_seconds:.0f} s", flush=True)


def read(results: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file."""
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


if __name__ == "__main__":
    sys.exit(main())
