"""Students of a self-supervised teacher, trained without labels: which form learns the most.

    python -m benchmarks.accuracy.features                    # hours of one core
    python -m benchmarks.accuracy.features --seeds 3 --match "^summary alone"

The teacher is a ViT-S/14 without a head that has seen no label of these images. It receives
unlabelled CIFAR-10 images as views of 70 px (5 x 5 tokens), the students (half the width of
ResNet-18) the same views at 40 px, in batches of 32, with AdamW, one epoch of warm-up, a cosine to
zero, and bf16 autocast where the processor multiplies bf16. Short runs use 4,000 images: three
cached passes, read twice (24,000 views), at a rate of 1.5e-3 where no other is stated. Long runs
use 20,000 images: two passes, the first read twice (60,000 views), at a rate of 4e-3; where 240,000
views are stated, both passes are read six times. 4,000
labelled images, part of the training images, serve as gallery of the nearest neighbours and to fit
the linear probe. *The fine-tuned teacher* of two short runs is an extension of the same cache; it
is the same network, fine-tuned on all training images with their labels.

A finished run is a line of the results, and is not repeated.
"""

import argparse
import io
import json
import platform
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scalekd.pipelines._run_options import EvaluateConfig
from scalekd.pipelines._source_options import ExtendConfig
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.configure import train_config
from scalekd.pipelines.evaluate import evaluate
from scalekd.pipelines.extend_cache import extend_cache
from scalekd.pipelines.train_student import train_student
from scalekd.teachers import TeacherConfig
from scalekd.training.precision import choose_precision

_RESULTS = Path(__file__).parents[1] / "results" / "features.jsonl"
_DATA = Path(__file__).parents[3] / "shared" / "data"  # beside the repository
_GALLERY = "train-{000000..000003}.tar"  # 4,000 of the 20,000 training images
_AUG = "crop:0.35..1+flip"
_STRONG_AUG = "crop:0.35..1+flip+rand-m7-mstd0.5-inc1"
_TEACHER_PX, _STUDENT_PX = 70, 40
_RATE = 1.5e-3  # of the other grids; with all labels, 4e-3 is as good
_STUDENT = {"model": "resnet18", "model_kwargs": {"channels": [32, 64, 128, 256]}}

HEADLESS = "vit_small_patch14_dinov2_headless"
TUNED = "vit_small_patch14_112_cifar10"


class Setting(NamedTuple):
    """The data of a table.

    Attributes:
        split: Training images.
        passes: Cached views of each image.
        epochs: Epochs of a run; passes repeat in order.
    """

    split: str
    passes: int
    epochs: int


SHORT = Setting(_GALLERY, passes=3, epochs=6)
LONG = Setting("train-{000000..000019}.tar", passes=2, epochs=3)
SETTINGS = {"short": SHORT, "long": LONG, "tuned": LONG._replace(passes=1), "few": LONG}
_FEW_EPOCHS = {500: 24, 2_000: 6}  # 12,000 views each, less incomplete batches


class Arm(NamedTuple):
    """One way of training the student.

    Attributes:
        name: First column of the table.
        objective: As ``--objective``; ``random`` and ``teacher`` train nothing.
        distillation: Settings of the objective.
        table: Key of `SETTINGS`, and the table that shows the arm.
        longer: Factor of the number of epochs; the cached passes are read that much more often.
        labels: Number of labelled images that the student is fine-tuned on.
        start: Arm of the table ``long`` whose student is fine-tuned; random weights if empty.
        rate: Learning rate.
        aug: Views of a student without a teacher.
        freeze: As ``--freeze``.
        targets: As ``--targets``; ``tuned`` is an extension by the fine-tuned teacher.
    """

    name: str
    objective: str
    distillation: Mapping[str, Any] = {}
    table: str = "short"
    longer: int = 1
    labels: int | None = None
    start: str = ""
    rate: float = _RATE
    aug: str = _AUG
    freeze: tuple[str, ...] = ()
    targets: str = ""

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.table]

    @property
    def teacher(self) -> str:
        return TUNED if self.table == "tuned" else HEADLESS

    @property
    def epochs(self) -> int:
        return self.longer * (_FEW_EPOCHS[self.labels] if self.labels else self.setting.epochs)


_ALONE = {"spatial": False, "frequency": False}
_CONVOLUTION = {"cap": False, "tpp": False}
_ATTENTION = {"cap": True, "tpp": True}
_STANDARDISED = {"summary": "standardised"}
_DIRECTION = {"summary": "direction"}
_NO_SUMMARY = {"summary_weight": 0}
BEST = "summary alone"
LONGER = f"{BEST}, 240,000 views"
ARMS = (
    Arm("the teacher itself, at 70 px", "teacher"),
    Arm("random weights", "random"),
    Arm("all labels, no teacher", "none"),
    Arm("all labels, no teacher, rate 4e-3", "none", rate=4e-3),
    Arm("summary alone", "features", _ALONE),
    Arm("summary alone, rate 4e-3", "features", _ALONE, rate=4e-3),
    Arm("summary alone: standardised", "features", _ALONE | _STANDARDISED),
    Arm("summary alone: direction", "features", _ALONE | _DIRECTION),
    Arm("convolutions and summary", "features", _CONVOLUTION),
    Arm("convolutions and summary: direction", "features", _CONVOLUTION | _DIRECTION),
    Arm("attention, tail and summary", "features", _ATTENTION),
    Arm("attention and summary, no tail", "features", {"cap": True, "tpp": False}),
    Arm("attention, tail and summary, spatial view", "features", _ATTENTION | {"frequency": False}),
    Arm("attention, tail and summary, frequency view", "features", _ATTENTION | {"spatial": False}),
    Arm("attention, tail and summary: direction", "features", _ATTENTION | _DIRECTION),
    Arm(
        "attention, tail and summary: direction, weight 16",
        "features",
        _ATTENTION | _DIRECTION | {"summary_weight": 16},
    ),
    Arm("attention and tail, no summary", "features", _ATTENTION | _NO_SUMMARY),
    Arm("convolutions, no summary", "features", _CONVOLUTION | _NO_SUMMARY),
    Arm("summary alone: the fine-tuned teacher", "features", _ALONE, targets="tuned"),
    Arm("summary alone: both teachers", "features", _ALONE, targets="base,tuned"),
    Arm("all labels, no teacher", "none", table="long", rate=4e-3),
    Arm(BEST, "features", _ALONE, table="long", rate=4e-3),
    Arm("all labels, no teacher, 240,000 views", "none", table="long", longer=4, rate=4e-3),
    Arm(LONGER, "features", _ALONE, table="long", longer=4, rate=4e-3),
    Arm("convolutions and summary", "features", _CONVOLUTION, table="long", rate=4e-3),
    Arm("attention, tail and summary", "features", _ATTENTION, table="long", rate=4e-3),
    Arm("the teacher itself, at 70 px", "teacher", table="tuned"),
    Arm(BEST, "features", _ALONE, table="tuned", rate=4e-3),
    *(
        Arm(f"{labels:,} labels, {name}", "none", table="few", labels=labels, **options)
        for labels in _FEW_EPOCHS
        for name, options in {
            "from random weights": {},
            "from random weights, RandAugment": {"aug": _STRONG_AUG},
            # With the fine-tuning, about the CPU time of pre-training on 60,000 views.
            "from random weights, 6 x the views": {"longer": 6},
            "from random weights, 6 x the views, RandAugment": {"longer": 6, "aug": _STRONG_AUG},
            # And that of pre-training on 240,000 views.
            "from random weights, 18 x the views, RandAugment": {"longer": 18, "aug": _STRONG_AUG},
            f"from {BEST}, rate 5e-4": {"start": BEST, "rate": 5e-4},
            f"from {BEST}": {"start": BEST},
            f"from {LONGER}": {"start": LONGER},
            f"from {LONGER}, 6 x the views": {"start": LONGER, "longer": 6},
            f"from {BEST}, rate 2e-4": {"start": BEST, "rate": 2e-4},
            f"from {BEST}, backbone frozen": {"start": BEST, "freeze": ("backbone",)},
        }.items()
    ),
)


def measure_teacher(arm: Arm, seed: int, *, data: Path) -> dict[str, Any]:
    """Measure the teacher like a student; returns its line of the results."""
    model = f"local-dir:{data / 'teacher' / arm.teacher}"
    return _row(arm, seed, views=0, seconds=0, **_scores(model, data, img_size=_TEACHER_PX))


def _row(arm: Arm, seed: int, *, views: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "table": arm.table,
        "arm": arm.name,
        "seed": seed,
        "objective": arm.objective,
        "views": views,
        "train_cpu_seconds": seconds,
        **more,
    }


def _scores(model: str, data: Path, *, features: bool = True, **options: Any) -> dict[str, float]:
    if features:
        options |= {"knn_split": _GALLERY, "linear_probe": _GALLERY}
    metrics = evaluate(
        EvaluateConfig(
            model=model, data_dir=str(data / "cifar10"), workers=0, amp="auto", **options
        )
    )
    names = ("knn_top1", "linear_top1", "top1")
    return {name: metrics[name] for name in names if metrics.get(name) is not None}


def train(arm: Arm, seed: int, *, data: Path, work: Path) -> dict[str, Any]:
    """Train and measure one student; returns its line of the results."""
    run = _run_folder(arm, seed, work)
    shutil.rmtree(run, ignore_errors=True)
    options: dict[str, Any] = {
        **_STUDENT,
        "data_dir": str(data / "cifar10"),
        "split": arm.setting.split,
        "val_split": None,
        "img_size": _STUDENT_PX,
        "epochs": 1 if arm.objective == "random" else arm.epochs,
        "warmup_epochs": 0 if arm.objective == "random" else 1,
        "batch_size": 32,
        "lr": 1e-30 if arm.objective == "random" else arm.rate,
        "freeze": arm.freeze,
        "seed": seed,
        "channels_last": True,
        "workers": 0,
        "checkpoint_hist": 1,
        "output": str(run),
    }
    if arm.objective == "features":
        options |= {
            "objective": "features",
            "cache": str(make_cache(arm, data, work)),
            "labels": "none",
            "distillation": list(arm.distillation.items()),
        }
        if arm.targets:
            options["targets"] = arm.targets
    else:
        options |= {"objective": "none", "aug": arm.aug}
    if arm.labels:
        options |= {"data_dir": str(_labelled(arm.labels, data, work)), "split": "train-*.tar"}
    if arm.start:
        options["initial_checkpoint"] = str(_started(arm.start, seed, data=data, work=work))
    started = time.process_time()
    result = train_student(train_config(None, options))
    seconds = round(time.process_time() - started, 1)
    untrained = arm.objective == "random"
    row = _row(
        arm,
        seed,
        views=0 if untrained else result.samples_viewed,
        seconds=0 if untrained else seconds,
        distillation=dict(arm.distillation),
        lr=options["lr"],
        aug=arm.aug,
        **_scores(str(run / "last"), data, features=arm.labels is None),
        train={k: v for k, v in result.metrics.items() if k.startswith("train_")},
        software={"torch": torch.__version__, "python": platform.python_version()},
        machine={"precision": choose_precision("auto"), "threads": torch.get_num_threads()},
    )
    if not (arm.table == "long" and arm.name in (BEST, LONGER)):  # which are fine-tuned
        shutil.rmtree(run)
    return row


def _run_folder(arm: Arm, seed: int, work: Path) -> Path:
    return work / "runs" / f"{arm.table}-{arm.name.replace(' ', '_')}-{seed}"


def _started(name: str, seed: int, *, data: Path, work: Path) -> Path:
    """Return the trained student of an arm, after training it if its folder was removed."""
    arm = next(arm for arm in ARMS if (arm.table, arm.name) == ("long", name))
    last = _run_folder(arm, seed, work) / "last"
    if not last.exists():
        train(arm, seed, data=data, work=work)
    return last


def _labelled(number: int, data: Path, work: Path) -> Path:
    """Write a tar of the first labelled training images."""
    folder = work / f"labelled-{number}"
    target = folder / "train-000000.tar"
    if target.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    keys: set[str] = set()
    with tarfile.open(target.with_suffix(".part"), "w") as written:
        for source in sorted((data / "cifar10").glob("train-*.tar")):
            with tarfile.open(source) as read:
                for member in read:
                    content = read.extractfile(member)
                    key = member.name.partition(".")[0]
                    if content is None or (key not in keys and len(keys) == number):
                        continue
                    keys.add(key)
                    written.addfile(member, io.BytesIO(content.read()))
            if len(keys) == number:
                break
    shutil.copy(data / "cifar10" / "classes.txt", folder)
    target.with_suffix(".part").rename(target)
    return folder


def make_cache(arm: Arm, data: Path, work: Path) -> Path:
    """Write the cache of an arm's unlabelled views, or complete it."""
    cache = work / f"cache-{'tuned' if arm.teacher == TUNED else arm.table}"
    cache_teacher(
        CacheTeacherConfig(
            teacher=TeacherConfig(
                model=f"local-dir:{data / 'teacher' / arm.teacher}",
                img_size=(_TEACHER_PX, _TEACHER_PX),
            ),
            data_dir=str(data / "cifar10"),
            split=arm.setting.split,
            labels="none",
            output=cache,
            passes=arm.setting.passes,
            stages=(4,),
            logits="none",
            aug=_AUG,
            codec="float16",
            precision="bf16" if choose_precision("auto") == "bf16" else "fp32",
            workers=0,
        )
    )
    if "tuned" in arm.targets:
        extend_cache(
            ExtendConfig(
                cache=cache,
                data_dir=str(data / "cifar10"),
                split=arm.setting.split,
                labels="none",
                name="tuned",
                model=f"local-dir:{data / 'teacher' / TUNED}",
                stages=(4,),
                logits="none",
                codec="float16",
                workers=0,
            )
        )
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=_DATA, help="folder with cifar10 and teacher")
    parser.add_argument("--work", type=Path, default=Path("output/features"), help="for caches")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", default="", help="only arms of this table")
    parser.add_argument(
        "--match", default="", help="only arms whose name this regular expression finds"
    )
    arguments = parser.parse_args()
    for folder in ("cifar10", f"teacher/{HEADLESS}", f"teacher/{TUNED}"):
        if not (arguments.data / folder).is_dir():
            parser.error(
                f"there is no folder {arguments.data / folder}; give the folder of the data with"
                " --data"
            )
    torch.set_num_threads(1)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(1, arguments.seeds + 1):
        for arm in ARMS:
            if not re.search(arguments.match, arm.name) or arguments.table not in ("", arm.table):
                continue
            if (arm.table, arm.name, seed) in done(arguments.results):
                continue
            if arm.objective == "teacher" and seed > 1:  # has no seed
                continue
            if arm.objective == "teacher":
                row = measure_teacher(arm, seed, data=arguments.data)
            else:
                row = train(arm, seed, data=arguments.data, work=arguments.work)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            scores = {n: row[n] for n in ("knn_top1", "linear_top1", "top1") if n in row}
            seconds = row["train_cpu_seconds"]
            print(f"{arm.table}: {arm.name}, seed {seed}: {scores}, {seconds} s", flush=True)


def done(path: Path) -> set[tuple[str, str, int]]:
    """Return the finished runs: table, arm and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["table"], row["arm"], row["seed"]) for row in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(main())
