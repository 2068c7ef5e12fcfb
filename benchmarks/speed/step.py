"""A training step from the cache against one with the live teacher, and the wait for data.

The limit of a cached step is the online one less the teacher's forward; its distance from that
limit is the price of decoding targets. Both steps are made by the trainer's own parts over the same
batch in memory. ``train`` runs ``scalekd train-student`` itself for an epoch and reads what
share of it was spent waiting for the loader.
"""

import csv
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings, median, median_ratio, per, take_turns
from benchmarks.speed._training import make_steps
from scalekd.cache import CacheReader, TargetDecoder, open_cache
from scalekd.images import open_dataset
from scalekd.loading import CachedViewLoader
from scalekd.pipelines.train_student import train_student
from scalekd.teachers import load_teacher
from scalekd.training.config import TrainConfig

_STUDENTS = ("resnet18", "vit_tiny_patch16_224")
_IMG_SIZE = 64


def run(settings: Settings) -> dict[str, Any]:
    root = _inputs.cifar_cache(settings)
    reader = open_cache(root)
    batch_size = 32 if settings.quick else 64
    teacher = load_teacher(_inputs.teacher_config(settings))
    decoder = TargetDecoder(reader.codecs, features=True, logits=True)
    batch = _batch(reader, settings, batch_size, decoder.groups)
    students = {}
    for model in _STUDENTS:
        steps = make_steps(model, img_size=_IMG_SIZE, teacher=teacher, decoder=decoder, batch=batch)
        costs = take_turns(
            {
                "cached": steps.cached,
                "online": steps.online,
                "teacher": steps.teacher,
                "decode": lambda: decoder(batch),
            },
            4 if settings.quick else 9,
        )
        seconds = {name: median(found).cpu for name, found in costs.items()}
        limit = seconds["online"] - seconds["teacher"]
        students[model] = {
            "per_view": {name: per(found, batch_size) for name, found in costs.items()},
            "cached_over_online": median_ratio(costs["cached"], costs["online"], "cpu"),
            "limit_over_online": limit / seconds["online"],
            "cached_over_limit": seconds["cached"] / limit,
            "decode_over_cached": median_ratio(costs["decode"], costs["cached"], "cpu"),
        }
    return {
        "img_size": _IMG_SIZE,
        "teacher_size": teacher.spec.img_size,
        "batch_size": batch_size,
        "students": students,
        "training": {
            model: _train(settings, root, model)
            for model in (_STUDENTS[:1] if settings.quick else _STUDENTS)
        },
    }


def _batch(
    reader: CacheReader, settings: Settings, batch_size: int, groups: tuple[str, ...]
) -> dict[str, Tensor]:
    """The same views at both sizes: one order, two loaders."""
    images = open_dataset(str(settings.data / "cifar10"))
    large, small = (
        next(
            iter(
                CachedViewLoader(
                    reader, images, batch_size=batch_size, view_size=size, groups=groups
                ).epoch(0)
            )
        )
        for size in (None, (_IMG_SIZE, _IMG_SIZE))
    )
    if not torch.equal(large["label"], small["label"]):
        raise RuntimeError("two loaders of one seed gave other views")
    return {**small, "teacher_pixels": large["pixels"]}


def _train(settings: Settings, root: Path, model: str) -> dict[str, float]:
    output = settings.work / f"run-{model}"
    shutil.rmtree(output, ignore_errors=True)
    train_student(
        TrainConfig.from_mapping(
            {
                "model": model,
                "output": str(output),
                "cache": str(root),
                "data_dir": str(settings.data / "cifar10"),
                "val_split": None,
                "img_size": _IMG_SIZE,
                "epochs": 1,
                "batch_size": 64,
                "workers": 1,
                "amp": "no",
            },
            source="the benchmark",
        )
    )
    with (output / "summary.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    return {name: float(row[name]) for name in ("images_per_second", "data_wait_share")}
