"""Students of a self-supervised teacher, trained without labels: which form learns the most.

    python -m benchmarks.accuracy.features              # about an hour of one core
    python -m benchmarks.accuracy.features --seeds 3 --match summary

The teacher is a ViT-S/14 without a head that has seen no label of these images. It receives 4,000
unlabelled CIFAR-10 images as views of 70 px (5 x 5 tokens), the students (half the width of
ResNet-18) the same views at 40 px: three cached passes, read twice (six epochs, 24,000 views), in
batches of 32, with AdamW, one epoch of warm-up, a cosine to zero, and bf16 autocast where the
processor multiplies bf16. The labels of the same 4,000 images serve as gallery of the nearest
neighbours and to fit the linear probe. A finished run is a line of the results, and is not
repeated.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scalekd.pipelines._run_options import EvaluateConfig
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.configure import train_config
from scalekd.pipelines.evaluate import evaluate
from scalekd.pipelines.train_student import train_student
from scalekd.teachers import TeacherConfig
from scalekd.training.precision import choose_precision

_RESULTS = Path(__file__).parents[1] / "results" / "features.jsonl"
_DATA = Path(__file__).parents[3] / "shared" / "data"  # beside the repository
_TEACHER = "vit_small_patch14_dinov2_headless"
_SPLIT = "train-{000000..000003}.tar"  # 4,000 of the 20,000 training images
_AUG = "crop:0.35..1+flip"
_PASSES, _EPOCHS = 3, 6
_TEACHER_PX, _STUDENT_PX = 70, 40
_RATE = 1.5e-3  # of the other grids, chosen there with students that learn from labels
_STUDENT = {"model": "resnet18", "model_kwargs": {"channels": [32, 64, 128, 256]}}


class Arm(NamedTuple):
    """One way of training the student.

    Attributes:
        name: First column of the table.
        objective: As ``--objective``; ``random`` and ``teacher`` train nothing.
        distillation: Settings of the objective.
        epochs: Number of epochs.
    """

    name: str
    objective: str
    distillation: Mapping[str, Any] = {}
    epochs: int = _EPOCHS


_NO_VIEWS = {"spatial": False, "frequency": False}
ARMS = (
    Arm("the teacher itself, at 70 px", "teacher"),
    Arm("random weights", "random"),
    Arm("all labels, no teacher", "none"),
    Arm("summary alone", "features", _NO_VIEWS),
    Arm("features (default)", "features"),
    Arm("without the summary", "features", {"summary_weight": 0}),
    Arm("convolution for CAP, without TPP", "features", {"cap": False, "tpp": False}),
    Arm("without TPP", "features", {"tpp": False}),
    Arm("summary alone, four times the views", "features", _NO_VIEWS, 4 * _EPOCHS),
    Arm("spatial view and summary", "features", {"frequency": False}),
    Arm("frequency view and summary", "features", {"spatial": False}),
    Arm("spatial view alone", "features", {"frequency": False, "summary_weight": 0}),
    Arm("frequency view alone", "features", {"spatial": False, "summary_weight": 0}),
    Arm("summary weight 16", "features", {"summary_weight": 16}),
)


def measure_teacher(arm: Arm, seed: int, *, data: Path, teacher: str) -> dict[str, Any]:
    """Measure the teacher like a student; returns its line of the results."""
    scores = _scores(f"local-dir:{data / 'teacher' / teacher}", data, img_size=_TEACHER_PX)
    return {
        "arm": arm.name,
        "seed": seed,
        "objective": arm.objective,
        "views": 0,
        "train_cpu_seconds": 0,
        **scores,
    }


def _scores(model: str, data: Path, **options: Any) -> dict[str, float]:
    metrics = evaluate(
        EvaluateConfig(
            model=model,
            data_dir=str(data / "cifar10"),
            knn_split=_SPLIT,
            linear_probe=_SPLIT,
            workers=0,
            amp="auto",
            **options,
        )
    )
    return {name: metrics[name] for name in ("knn_top1", "linear_top1")}


def train(arm: Arm, seed: int, *, data: Path, cache: Path, work: Path) -> dict[str, Any]:
    """Train and measure one student; returns its line of the results."""
    run = work / "runs" / f"{arm.name.replace(' ', '_')}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    options: dict[str, Any] = {
        **_STUDENT,
        "data_dir": str(data / "cifar10"),
        "split": _SPLIT,
        "val_split": None,
        "img_size": _STUDENT_PX,
        "epochs": 1 if arm.objective == "random" else arm.epochs,
        "warmup_epochs": 0 if arm.objective == "random" else 1,
        "batch_size": 32,
        "lr": 1e-30 if arm.objective == "random" else _RATE,
        "seed": seed,
        "channels_last": True,
        "workers": 0,
        "checkpoint_hist": 1,
        "output": str(run),
    }
    if arm.objective == "features":
        options |= {
            "objective": "features",
            "cache": str(cache),
            "labels": "none",
            "distillation": list(arm.distillation.items()),
        }
    else:
        options |= {"objective": "none", "aug": _AUG}
    started = time.process_time()
    result = train_student(train_config(None, options))
    seconds = time.process_time() - started
    scores = _scores(str(run / "last"), data)
    shutil.rmtree(run)
    return {
        "arm": arm.name,
        "seed": seed,
        "objective": arm.objective,
        "distillation": dict(arm.distillation),
        "lr": options["lr"],
        "views": 0 if arm.objective == "random" else result.samples_viewed,
        **scores,
        "train_cpu_seconds": 0 if arm.objective == "random" else round(seconds, 1),
        "train": {k: v for k, v in result.metrics.items() if k.startswith("train_")},
        "software": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"precision": choose_precision("auto"), "threads": torch.get_num_threads()},
    }


def make_cache(data: Path, teacher: str, cache: Path) -> None:
    """Write the cache of unlabelled views, or complete it."""
    cache_teacher(
        CacheTeacherConfig(
            teacher=TeacherConfig(
                model=f"local-dir:{data / 'teacher' / teacher}",
                img_size=(_TEACHER_PX, _TEACHER_PX),
            ),
            data_dir=str(data / "cifar10"),
            split=_SPLIT,
            labels="none",
            output=cache,
            passes=_PASSES,
            stages=(4,),
            logits="none",
            aug=_AUG,
            codec="float16",
            precision="bf16" if choose_precision("auto") == "bf16" else "fp32",
            workers=0,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=_DATA, help="folder with cifar10 and teacher")
    parser.add_argument("--teacher", default=_TEACHER, help="folder below teacher")
    parser.add_argument("--work", type=Path, default=Path("output/features"), help="for caches")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--match", default="", help="only arms whose name holds this text")
    arguments = parser.parse_args()
    for folder in (arguments.data / "cifar10", arguments.data / "teacher" / arguments.teacher):
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}; give the folder of the data with --data")
    torch.set_num_threads(1)
    cache = arguments.work / "cache"
    make_cache(arguments.data, arguments.teacher, cache)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(1, arguments.seeds + 1):
        for arm in ARMS:
            if arguments.match not in arm.name or (arm.name, seed) in _done(arguments.results):
                continue
            if arm.objective == "teacher" and seed > 1:  # has no seed
                continue
            if arm.objective == "teacher":
                row = measure_teacher(arm, seed, data=arguments.data, teacher=arguments.teacher)
            else:
                row = train(arm, seed, data=arguments.data, cache=cache, work=arguments.work)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{row['knn_top1']:6.2f} {row['linear_top1']:6.2f} "
                f"{row['train_cpu_seconds']:7.1f} s  {arm.name}, seed {seed}",
                flush=True,
            )


def _done(path: Path) -> set[tuple[str, int]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["arm"], row["seed"]) for row in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(main())
