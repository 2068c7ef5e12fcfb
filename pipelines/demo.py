"""The whole path on scikit-learn's handwritten digits: no network, no GPU, no other file.

    scalekd demo

Trains a small Swin teacher on 1,297 digits, caches what it says of 60 of them, trains the same
student on those 60 three ways (labels alone, labels and logits, ScaleKD), over three seeds, and
prints what comes out.
"""

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from pydantic import BaseModel
from sklearn.datasets import load_digits
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from scalekd.images import ImageDataset, open_dataset
from scalekd.loading import draw_view
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.report import report
from scalekd.pipelines.train_student import train_student
from scalekd.teachers import Teacher, TeacherConfig, load_teacher
from scalekd.training import TrainConfig
from scalekd.views import ViewPolicy

_IMAGE_PX = 32
_NUM_TRAIN, _NUM_FEW = 1297, 60
_AUG = "crop:0.5..1"  # a mirrored 2 is no digit
_SEEDS = (0, 1, 2)
_OBJECTIVES = {"none": "no teacher", "kd": "logits only", "scalekd": "ScaleKD"}
_PASSES = 8
_TEACHER = TeacherConfig(
    model="swin_tiny_patch4_window7_224",
    pretrained=False,
    img_size=(_IMAGE_PX, _IMAGE_PX),
    model_kwargs={
        "patch_size": 2,
        "embed_dim": 24,
        "depths": [1, 1, 2, 2],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
        "num_classes": 10,
    },
)
_TEACHER_EPOCHS, _TEACHER_BATCH, _TEACHER_LR = 10, 64, 2e-3
_STUDENT, _STUDENT_BATCH, _STUDENT_LR = "resnet10t", 30, 2e-3
_WEIGHTS = {"spatial_weight": 0.08, "frequency_weight": 0.06}


class DemoRow(BaseModel):
    """One way of training the student, over the seeds."""

    objective: str
    top1: tuple[float, ...]
    mean: float
    spread: float
    seconds: float


class DemoResult(BaseModel):
    """What the demo measured; accuracies in percent."""

    teacher_top1: float
    teacher_seconds: float
    cache_bytes: int
    cache_views: int
    cache_seconds: float
    rows: tuple[DemoRow, ...]
    report: str
    seconds: float

    def lines(self) -> list[str]:
        """The table that people read."""
        student = f"student, {_NUM_FEW} labels"
        scores = [f"{row.mean:.1f} ± {row.spread:.1f} %" for row in self.rows]
        return [
            f"teacher: {self.teacher_top1:.1f} % top-1, trained in {self.teacher_seconds:.0f} s",
            f"cache:   {self.cache_views:,} views, {self.cache_bytes / 1e6:.1f} MB,"
            f" written in {self.cache_seconds:.0f} s",
            "",
            f"{student:<22}{'top-1':>16}{'seconds a run':>16}",
            *(
                f"{row.objective:<22}{score:>16}{row.seconds:>16.1f}"
                for row, score in zip(self.rows, scores, strict=True)
            ),
            "",
            f"mean and standard deviation over {len(_SEEDS)} seeds; curves in {self.report};"
            f" {self.seconds:.0f} s in all",
        ]


def run_demo(
    output: Path, *, epochs: int = 24, say: Callable[[str], None] = lambda line: None
) -> DemoResult:
    """Run the demo in a folder.

    Args:
        output: New or empty folder for images, teacher, cache and runs.
        epochs: Epochs each student is trained.
        say: Told what is going on.
    """
    started = time.monotonic()
    torch.set_num_threads(1)  # tensors this small only lose by being divided
    say("writing scikit-learn's digits as WebDataset shards")
    write_digits(output / "data")
    say("training a Swin teacher on all training digits")
    teacher, teacher_seconds = _timed(lambda: train_teacher(output / "data"))
    checkpoint = output / "teacher.pt"
    torch.save(teacher.model.state_dict(), checkpoint)
    teacher_top1 = _accuracy(teacher, open_dataset(str(output / "data"), "val"))
    say(f"caching {_PASSES} views each of {_NUM_FEW} digits")
    cached = cache_teacher(
        CacheTeacherConfig(
            teacher=_TEACHER.model_copy(update={"checkpoint": str(checkpoint)}),
            data_dir=str(output / "data"),
            split="few",
            output=output / "cache",
            passes=_PASSES,
            aug=_AUG,
            workers=0,
        )
    )
    rows = []
    folders: dict[str, list[Path]] = {}
    for objective, name in _OBJECTIVES.items():
        say(f"training {_STUDENT} with {name}, {len(_SEEDS)} seeds")
        folders[name] = [output / "runs" / f"{objective}-{seed}" for seed in _SEEDS]
        scores, seconds = _timed(
            lambda objective=objective, name=name: [  # type: ignore[misc]
                _train(output, objective, seed, folder, epochs)
                for seed, folder in zip(_SEEDS, folders[name], strict=True)
            ]
        )
        rows.append(
            DemoRow(
                objective=name,
                top1=tuple(scores),
                mean=statistics.mean(scores),
                spread=statistics.stdev(scores),
                seconds=seconds / len(_SEEDS),
            )
        )
    page = report([run for runs in folders.values() for run in runs], output / "report.html")
    return DemoResult(
        teacher_top1=teacher_top1,
        teacher_seconds=teacher_seconds,
        cache_bytes=cached.total_bytes or 0,
        cache_views=cached.num_samples * cached.num_passes,
        cache_seconds=cached.seconds,
        rows=tuple(rows),
        report=page.output,
        seconds=time.monotonic() - started,
    )


def write_digits(folder: Path) -> None:
    """Write the digits as ``train``, ``few`` (the first of train) and ``val`` shards."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    parts = {
        "train": order[:_NUM_TRAIN],
        "few": order[:_NUM_FEW],
        "val": order[_NUM_TRAIN:],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, members in parts.items():
        with webdataset.TarWriter(str(folder / f"{split}-000000.tar"), mtime=0) as tar:
            for index in members:
                grey = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
                picture = io.BytesIO()
                Image.fromarray(grey).resize((_IMAGE_PX, _IMAGE_PX), Image.Resampling.BICUBIC).save(
                    picture, "PNG"
                )
                tar.write(
                    {
                        "__key__": f"digit_{index:04d}",
                        "png": picture.getvalue(),
                        "cls": str(digits.target[index]).encode(),
                    }
                )
    (folder / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))


def train_teacher(data_dir: Path) -> Teacher:
    """Train the teacher with plain cross entropy on freshly drawn views."""
    torch.manual_seed(0)
    teacher = load_teacher(_TEACHER)
    model = teacher.model.requires_grad_(True).train()
    images = open_dataset(str(data_dir), "train")
    policy = ViewPolicy.parse(_AUG)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=_TEACHER_LR, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=_TEACHER_EPOCHS)
    labels = torch.from_numpy(images.labels).long()
    for epoch in range(_TEACHER_EPOCHS):
        pixels = _views(images, policy, epoch)
        for batch in torch.randperm(len(images)).split(_TEACHER_BATCH):  # type: ignore[no-untyped-call]
            loss = torch.nn.functional.cross_entropy(
                model(teacher.normalise(pixels[batch])), labels[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step(epoch + 1)
    model.requires_grad_(False).eval()
    return teacher


def _views(images: ImageDataset, policy: ViewPolicy, epoch: int) -> Tensor:
    drawn = [
        draw_view(
            images[index], policy, seed=1, pass_index=epoch, view_size=(_IMAGE_PX, _IMAGE_PX)
        ).pixels
        for index in range(len(images))
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def _accuracy(teacher: Teacher, images: ImageDataset) -> float:
    pixels = _views(images, ViewPolicy.parse("center:1"), 0)
    with torch.inference_mode():
        logits = teacher(pixels).logits
    if logits is None:
        raise RuntimeError("the demo's teacher has a head")
    return float((logits.argmax(1).numpy() == images.labels).mean() * 100)


def _train(output: Path, objective: str, seed: int, folder: Path, epochs: int) -> float:
    result = train_student(
        TrainConfig.from_mapping(
            {
                "cache": str(output / "cache"),
                "data_dir": str(output / "data"),
                "split": "few",
                "model": _STUDENT,
                "model_kwargs": {"output_stride": 16},  # at 32 px, stride 32 would leave one token
                "objective": objective,
                "distillation": {"stage3": _WEIGHTS, "stage4": _WEIGHTS},
                "epochs": epochs,
                "batch_size": _STUDENT_BATCH,
                "lr": _STUDENT_LR,
                "warmup_epochs": min(2, epochs // 2),
                "seed": seed,
                "workers": 0,
                "amp": "no",
                "eval_interval": 4,
                "checkpoint_hist": 1,
                "output": str(folder),
            }
        )
    )
    return float(result.metrics["eval_top1"])


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    return work(), time.monotonic() - started
