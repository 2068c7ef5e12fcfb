"""Run all stages on scikit-learn's handwritten digits, without network, GPU or other files.

    scalekd demo

The demo trains a small Swin teacher on 1,297 labelled digits and writes a cache of its outputs for
the same digits, 60 of which keep their label. It then trains a student in three ways, each with
three seeds.
"""

import contextlib
import io
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel

from scalekd.images import open_dataset
from scalekd.pipelines._digits import (
    AUG,
    IMAGE_PX,
    NUM_LABELLED,
    NUM_TRAIN,
    accuracy,
    train_teacher,
    write_digits,
)
from scalekd.pipelines._source_options import ShowConfig
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.export import export
from scalekd.pipelines.report import report
from scalekd.pipelines.show_cache import show_cache
from scalekd.pipelines.train_student import train_student
from scalekd.teachers import TeacherConfig, load_teacher
from scalekd.training import TrainConfig

TEACHER_NAME = "digits-swin"
_SEEDS = (0, 1, 2)
_PASSES = 4
_STUDENT, _BATCH, _LR = "resnet10t", 32, 4e-3
_STUDENT_ARGUMENTS = {"channels": [32, 64, 128, 256], "output_stride": 16}  # 2 x 2 at 32 px


class _Way(NamedTuple):
    """One way of training the student."""

    name: str
    objective: str
    split: str


_WAYS = (
    _Way("no teacher", "none", "labelled"),
    _Way("logits", "kd", "train"),
    _Way("ScaleKD (light)", "scalekd-light", "train"),
)


_INTRODUCTION = (
    f"The teacher, a small Swin, was trained from random weights on {NUM_TRAIN:,} labelled digits."
    f" The student has {NUM_LABELLED} of the labels. Without the teacher it learns from these"
    f" {NUM_LABELLED} digits; with the cache it learns from all {NUM_TRAIN:,}, labelled or not:"
    " from the teacher's logits, or from its logits and features (ScaleKD). All students see the"
    " same number of views."
)


class DemoRow(BaseModel):
    """Results of one way of training the student, over the seeds; accuracies in percent."""

    name: str
    objective: str
    num_images: int
    top1: tuple[float, ...]
    mean: float
    spread: float
    seconds: float


class DemoResult(BaseModel):
    """Measurements of the demo; accuracies in percent."""

    teacher_top1: float
    teacher_seconds: float
    cache: str
    cache_bytes: int
    cache_views: int
    cache_seconds: float
    rows: tuple[DemoRow, ...]
    student: str
    report: str
    seconds: float

    def table(self) -> list[str]:
        """Return the measurements as lines of text."""
        header = f"student, {NUM_LABELLED} labels"
        scores = [f"{row.mean:.1f} ± {row.spread:.1f} %" for row in self.rows]
        return [
            f"{header:<22}{'images':>8}{'top-1':>16}{'seconds a run':>16}",
            *(
                f"{row.name:<22}{row.num_images:>8,}{score:>16}{row.seconds:>16.1f}"
                for row, score in zip(self.rows, scores, strict=True)
            ),
            f"{f'teacher, {NUM_TRAIN:,} labels':<22}{NUM_TRAIN:>8,}"
            f"{f'{self.teacher_top1:.1f} %':>16}{self.teacher_seconds:>16.1f}",
        ]

    def lines(self) -> list[str]:
        """Return the lines to print."""
        return [
            "",
            *self.table(),
            "",
            f"top-1 on 500 other digits, mean and standard deviation over {len(_SEEDS)} seeds;"
            f" {self.seconds:.0f} s in all",
            f"curves:   {Path(self.report).as_uri()}",
            f"try next: scalekd cache info {self.cache}",
            f"          scalekd evaluate local-dir:{self.student} --data-dir"
            f" {Path(self.cache).parent / 'data'} --split val",
            "          scalekd cache-teacher --help; docs/your-classes.md for your own images",
        ]


def run_demo(
    output: Path,
    *,
    epochs: int = 4,
    processes: int = 2,
    say: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Run the demo in a folder.

    Args:
        output: New or empty folder for images, teacher, caches and runs.
        epochs: Number of epochs that each student is trained.
        processes: Number of students that are trained at once; the results do not depend on it.
        say: Function that receives lines about the progress.
    """
    started = time.monotonic()
    torch.set_num_threads(1)  # tensors this small only lose by being divided
    data = output / "data"
    say("writing scikit-learn's digits as WebDataset shards")
    write_digits(data)
    say(f"training the teacher, a small Swin, on {NUM_TRAIN:,} labelled digits")
    teacher_started = time.monotonic()
    train_teacher(data, output / TEACHER_NAME, say=say)
    teacher = TeacherConfig(model=f"local-dir:{output / TEACHER_NAME}")
    teacher_top1 = accuracy(load_teacher(teacher), open_dataset(str(data), "val"))
    teacher_seconds = time.monotonic() - teacher_started
    say(f"teacher: {teacher_top1:.1f} % top-1 in {teacher_seconds:.0f} s")
    say(f"caching {_PASSES} views of each of {NUM_TRAIN:,} digits, {NUM_LABELLED} with a label")
    cached = cache_teacher(
        CacheTeacherConfig(
            teacher=teacher,
            data_dir=str(data),
            output=output / "cache",
            passes=_PASSES,
            aug=AUG,
            workers=0,
        )
    )
    runs = {
        (way, seed): output / "runs" / f"{way.objective}-{seed}" for way in _WAYS for seed in _SEEDS
    }
    say(f"training {len(runs)} students ({_STUDENT}), {processes} at once")
    scores: dict[tuple[_Way, int], tuple[float, float]] = {}
    for (way, seed), score, seconds in _train_all(output, runs, epochs, processes):
        scores[way, seed] = (score, seconds)
        say(
            f"  student {len(scores)} of {len(runs)}: {way.name}, seed {seed}: {score:.1f} % top-1"
            f" in {seconds:.0f} s"
        )
    rows = tuple(_row(way, [scores[way, seed] for seed in _SEEDS]) for way in _WAYS)
    student = output / "student"
    export(runs[_WAYS[-1], _SEEDS[0]], student)
    show_cache(
        ShowConfig(
            cache=output / "cache",
            data_dir=str(data),
            model=teacher.model,
            teacher=True,
            output=output / "cache.html",
        )
    )
    result = DemoResult(
        teacher_top1=teacher_top1,
        teacher_seconds=teacher_seconds,
        cache=str(output / "cache"),
        cache_bytes=cached.total_bytes or 0,
        cache_views=cached.num_samples * cached.num_passes,
        cache_seconds=cached.seconds,
        rows=rows,
        student=str(student),
        report=str((output / "report.html").absolute()),
        seconds=time.monotonic() - started,
    )
    report(
        list(runs.values()),
        output / "report.html",
        names=[way.name for way in _WAYS],
        title="Handwritten digits: one student, three ways of training",
        introduction=_INTRODUCTION,
        table=result.table(),
    )
    for run in runs.values():
        _drop_weights(run)
    return result


def _train_all(
    output: Path, runs: dict[tuple[_Way, int], Path], epochs: int, processes: int
) -> Iterator[tuple[tuple[_Way, int], float, float]]:
    """Train every student; yield key, top-1 and seconds of each run as it ends."""
    if processes == 1:
        for (way, seed), folder in runs.items():
            yield (way, seed), *_train(output, way, seed, folder, epochs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        # The longest first, so that no process is idle at the end.
        started = {
            pool.submit(_train, output, way, seed, folder, epochs): (way, seed)
            for (way, seed), folder in reversed(runs.items())
        }
        try:
            for done in as_completed(started):
                yield started[done], *done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _train(output: Path, way: _Way, seed: int, folder: Path, epochs: int) -> tuple[float, float]:
    """Train one student without output; return its top-1 and the seconds it took."""
    started = time.monotonic()
    torch.set_num_threads(1)
    without_cache = {"aug": AUG, "img_size": IMAGE_PX}
    images = without_cache if way.objective == "none" else {"cache": str(output / "cache")}
    config = TrainConfig.from_mapping(
        {
            **images,
            "data_dir": str(output / "data"),
            "split": way.split,
            "model": _STUDENT,
            "model_kwargs": _STUDENT_ARGUMENTS,
            "objective": way.objective,
            "epochs": epochs,
            "batch_size": _BATCH,
            "lr": _LR,
            "warmup_epochs": 0.5,
            "sched_on_updates": True,
            "seed": seed,
            "workers": 0,
            "amp": "no",
            "checkpoint_hist": 1,
            "output": str(folder),
        }
    )
    with contextlib.redirect_stderr(io.StringIO()):
        result = train_student(config)
    for copy in ("last", f"checkpoint-{epochs - 1}"):  # the report and the export read the best
        shutil.rmtree(folder / copy, ignore_errors=True)
    return float(result.metrics["eval_top1"]), time.monotonic() - started


def _row(way: _Way, scores: list[tuple[float, float]]) -> DemoRow:
    top1 = [score for score, _ in scores]
    return DemoRow(
        name=way.name,
        objective=way.objective,
        num_images=NUM_LABELLED if way.split == "labelled" else NUM_TRAIN,
        top1=tuple(top1),
        mean=statistics.mean(top1),
        spread=statistics.stdev(top1),
        seconds=statistics.mean(seconds for _, seconds in scores),
    )


def _drop_weights(run: Path) -> None:
    """Delete the checkpoints of a run; its configuration, log and curves are kept."""
    for folder in run.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)


def default_processes() -> int:
    """Return two, or one on a machine with one core."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(2, usable or 1)
