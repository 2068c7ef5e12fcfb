"""Train the grid's students. A finished run is a line of the results and is not repeated.

    python -m benchmarks.accuracy            # the whole grid: some hours on two cores
    python -m benchmarks.accuracy --quick    # the four objectives once, some minutes
    python -m benchmarks.accuracy --group codec --seeds 5
    python -m benchmarks.accuracy --list

Several of these commands may run at once: each run is trained by the process that starts it first.
``--quick`` only shows that the grid runs; its results are kept in a separate file.
"""

import argparse
import contextlib
import fcntl
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.accuracy import grid
from benchmarks.accuracy.caches import Caches
from benchmarks.accuracy.grid import Run
from benchmarks.accuracy.stage3 import extra_target
from scalekd.cache import open_cache
from scalekd.evaluation import Evaluator
from scalekd.pipelines.configure import train_config
from scalekd.pipelines.train_student import train_student
from scalekd.training.precision import choose_precision

_RESULTS = Path(__file__).parents[1] / "results"
_DATA = Path(__file__).parents[3] / "shared" / "data"  # beside the repository
_TEACHER = "vit_small_patch14_112_cifar10"
_QUICK_RATE, _QUICK = 2e-3, grid.Regime(num_images=500, passes=4, epochs=4)


@dataclass
class Results:
    """The lines of a results file."""

    path: Path

    def read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {row["key"]: row for row in rows}

    def append(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class _CpuClock:
    """CPU seconds of this process without those of evaluation."""

    def __init__(self) -> None:
        self.started = time.process_time()
        self.evaluating = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        original = Evaluator.__call__

        def timed(evaluator: Evaluator, *args: Any, **kwargs: Any) -> dict[str, float]:
            started = time.process_time()
            metrics = original(evaluator, *args, **kwargs)
            self.evaluating += time.process_time() - started
            return metrics

        with mock.patch.object(Evaluator, "__call__", timed):
            yield

    @property
    def training(self) -> float:
        return time.process_time() - self.started - self.evaluating


def train(run: Run, caches: Caches, work: Path) -> dict[str, Any]:
    """Train one student; returns its line of the results."""
    model, model_kwargs = grid.STUDENTS[run.student]
    folder = work / "runs" / run.key.replace(" ", "_").replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    config = train_config(
        None,
        {
            "cache": str(caches.get(run)),
            "data_dir": caches.data_dir,
            "model": model,
            "model_kwargs": model_kwargs,
            "img_size": grid.STUDENT_SIZES.get(run.student, grid.STUDENT_PX),
            "objective": run.cli_objective,
            # Published weights for 49 tokens, where a run states none.
            "distillation": list((dict(grid.weights(1)) | dict(run.distillation)).items()),
            "online": run.online,
            "teacher": caches.teacher.model if run.online else None,
            "epochs": run.epochs,
            "warmup_epochs": 1,
            "batch_size": grid.BATCH_SIZE,
            "lr": run.learning_rate,
            "seed": run.seed,
            "channels_last": model.startswith("resnet"),
            "workers": 0,
            "eval_interval": run.epochs,  # the last epoch's student counts
            "checkpoint_hist": 1,
            "output": str(folder),
        },
    )
    clock, started = _CpuClock(), time.monotonic()
    extra = extra_target() if run.objective == "stage3" else contextlib.nullcontext()
    with clock.watching(), extra:
        result = train_student(config)
    row = {
        "key": run.key,
        "run": run._asdict(),
        "lr": run.learning_rate,
        "top1": result.metrics["eval_top1"],
        "eval_loss": result.metrics["eval_loss"],
        "views": result.samples_viewed,
        "stage4_bytes_per_view": stage4_bytes(caches.get(run)),
        "train_cpu_seconds": round(clock.training, 1),
        "wall_seconds": round(time.monotonic() - started, 1),
        "train": {k: v for k, v in result.metrics.items() if k.startswith("train_")},
        "software": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "cpu": _cpu(),
            "precision": choose_precision(config.amp),
            "threads": torch.get_num_threads(),
        },
    }
    shutil.rmtree(folder)
    return row


def stage4_bytes(cache: Path) -> float:
    """Stored bytes of a view's final-stage features."""
    reader = open_cache(cache)
    num_views = reader.num_passes * len(reader.samples)
    total = sum(
        file.num_bytes
        for number in range(reader.num_passes)
        for shard in range(reader.identity.num_shards)
        for name, file in reader.record(number, shard).files.items()
        if "/stage4/" in name
    )
    return round(total / num_views, 1)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


@contextlib.contextmanager
def claimed(work: Path, run: Run) -> Iterator[bool]:
    """Whether this process may train a run; the claim ends with the process."""
    folder = work / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / run.key.replace(" ", "_").replace("/", "-")).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def wanted(groups: list[str], num_seeds: int) -> list[Run]:
    """Runs in the order in which they are worth having."""
    runs: list[Run] = []
    for group in groups:
        for seed in grid.SEEDS[:num_seeds]:
            runs += [arm.run._replace(seed=seed) for arm in grid.GROUPS[group]]
    return list(dict.fromkeys(runs))


def quick() -> list[Run]:
    return [Run(grid.CNN, name, epochs=_QUICK.epochs, rate=_QUICK_RATE) for name in grid.OBJECTIVES]


def train_missing(runs: Iterable[Run], results: Results, *, caches: Caches, work: Path) -> None:
    """Train what is neither finished nor somebody else's."""
    for run in runs:
        with claimed(work, run) as mine:
            if not mine or run.key in results.read():
                continue
            row = train(run, caches, work)
            results.append(row)
            print(f"{row['top1']:6.2f} % {row['train_cpu_seconds']:7.1f} s  {run.key}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=_DATA, help="folder with cifar10 and teacher")
    parser.add_argument("--work", type=Path, default=Path("output/accuracy"), help="for caches")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--group", action="append", choices=list(grid.GROUPS), help="repeat")
    parser.add_argument("--match", default="", help="only runs whose name holds this text")
    parser.add_argument("--seeds", type=int, default=len(grid.SEEDS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not")
    arguments = parser.parse_args()
    images, teacher = arguments.data / "cifar10", arguments.data / "teacher" / _TEACHER
    for folder in (images, teacher):
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}; give the folder of the data with --data")
    torch.set_num_threads(1)  # students this small only lose by being divided
    name = "accuracy-quick.jsonl" if arguments.quick else "accuracy.jsonl"
    results = Results(arguments.results or _RESULTS / name)
    work, regime = arguments.work, grid.REGIME
    if arguments.quick:
        work, regime = work / "quick", _QUICK
        results.path.unlink(missing_ok=True)  # it says what this machine does, today
        runs = quick()
    else:
        runs = wanted(arguments.group or list(grid.GROUPS), arguments.seeds)
    runs = [run for run in runs if arguments.match in run.key]
    if arguments.list:
        done = results.read()
        for run in runs:
            print("done" if run.key in done else "    ", run.key)
        return
    caches = Caches(work / "caches", data_dir=str(images), teacher=str(teacher), regime=regime)
    train_missing(runs, results, caches=caches, work=work)


if __name__ == "__main__":
    sys.exit(main())
