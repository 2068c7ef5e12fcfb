"""Seconds of clock and processor, arms that take turns, and where the figures were taken."""

import gc
import importlib.metadata
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_SOFTWARE = ("scalekd", "torch", "torchvision", "timm", "numpy", "pillow", "zarr", "pcodec")


@dataclass(frozen=True)
class Settings:
    """What a question may use.

    Attributes:
        quick: Take the form that needs at most a minute or two.
        data: Folder with ``cifar10``, ``teacher`` and ``imagenet-sample``.
        work: Folder for caches and copies; emptied by nobody, so that questions can share them.
    """

    quick: bool
    data: Path
    work: Path


@dataclass(frozen=True)
class Cost:
    """Seconds that work took.

    Attributes:
        wall: By the clock.
        cpu: Of all threads, and of child processes that have ended.
        thread: Of the calling thread alone.
    """

    wall: float
    cpu: float
    thread: float


def measured(work: Callable[[], object]) -> Cost:
    """Cost of one call; garbage is collected before it, and not during it."""
    gc.collect()
    gc.disable()
    try:
        wall, cpu, thread = time.perf_counter(), _processor_seconds(), time.thread_time()
        work()
        return Cost(
            time.perf_counter() - wall, _processor_seconds() - cpu, time.thread_time() - thread
        )
    finally:
        gc.enable()


def take_turns(
    arms: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[Cost]]:
    """Cost of every arm, ``repeats`` times each, in turn: what slows one round slows all arms."""
    if warm_up:
        for work in arms.values():
            work()
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    for turn in range(repeats):
        names = list(arms)
        for name in names if turn % 2 == 0 else reversed(names):
            costs[name].append(measured(arms[name]))
    return costs


def median(costs: list[Cost]) -> Cost:
    fields = [asdict(cost) for cost in costs]
    return Cost(**{name: statistics.median(f[name] for f in fields) for name in fields[0]})


def median_ratio(first: list[Cost], second: list[Cost], clock: str) -> float:
    """Median of the turns' own ratios, which a load that lasts longer than a turn leaves alone."""
    return statistics.median(
        getattr(a, clock) / getattr(b, clock) for a, b in zip(first, second, strict=True)
    )


def per(costs: list[Cost], number: int) -> dict[str, float]:
    """Median microseconds of each of ``number`` things done."""
    return {f"{name}_us": 1e6 * value / number for name, value in asdict(median(costs)).items()}


def _processor_seconds() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def resident_bytes() -> int:
    """Memory this process has now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's memory in /proc")


def environment(command: str, *, load_before: float) -> dict[str, Any]:
    """Machine, versions, command and load of a question that has just run."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "python": platform.python_version(),
        "software": {name: importlib.metadata.version(name) for name in _SOFTWARE},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
