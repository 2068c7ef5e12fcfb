"""Teachers, caches and students, made by the product's own commands."""

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from benchmarks.transfer import setting
from benchmarks.transfer.setting import Arm
from scalekd.evaluation import EvaluationConfig
from scalekd.export import load_backbone
from scalekd.pipelines._run_options import EvaluateConfig
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.configure import train_config
from scalekd.pipelines.evaluate import evaluate
from scalekd.pipelines.export import export
from scalekd.pipelines.train_student import train_student
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig
from scalekd.training import load_trained_student
from scalekd.training.precision import choose_precision


class Room(NamedTuple):
    """Where a benchmark works, and how long.

    Attributes:
        images: Folder of both image sets.
        teacher: Folder of the headless teacher.
        work: Folder of teachers, caches and runs.
        passes: Cached views of every image.
        epochs: Epochs of an arm whose factor is 1.
    """

    images: Path
    teacher: Path
    work: Path
    passes: int = setting.PASSES
    epochs: int = setting.EPOCHS


class Pretrained(NamedTuple):
    """A student for transfer.

    Attributes:
        model: The bare timm model, in eval mode.
        backbone: The same weights as a model that returns its levels; a teacher has none.
        view: Preprocessing of the images.
        views: Number of views that it was trained on.
        cpu_seconds: Processor time of its training.
        own_top1: Top-1 in percent on other images of its own classes, if it has a classifier.
    """

    model: nn.Module
    backbone: nn.Module | None
    view: EvaluationConfig
    views: int = 0
    cpu_seconds: float = 0.0
    own_top1: float | None = None


def pretrain(arm: Arm, seed: int, room: Room) -> Pretrained:
    """Train one student, or make it from random weights, or open the teacher."""
    if arm.objective == "teacher":
        return _opened(arm.teacher, room)
    if arm.objective == "scratch":
        return _scratch(seed)
    run = room.work / "runs" / f"{setting.ARMS.index(arm)}-{seed}"
    exported = run.with_name(f"{run.name}-export")
    for folder in (run, exported):
        shutil.rmtree(folder, ignore_errors=True)
    options: dict[str, Any] = {
        "model": setting.STUDENT,
        "model_kwargs": dict(setting.STUDENT_KWARGS),
        "objective": arm.objective,
        "data_dir": str(room.images / "pretrain"),
        "split": "few",
        "val_split": None,
        "img_size": setting.STUDENT_PX,
        "distillation": list(arm.distillation.items()),
        "epochs": arm.factor * room.epochs,
        "warmup_epochs": 1,
        "batch_size": setting.BATCH_SIZE,
        "lr": setting.RATE,
        "seed": seed,
        "channels_last": True,
        "workers": 0,
        "checkpoint_hist": 1,
        "output": str(run),
    }
    if arm.fresh:
        options["aug"] = setting.AUG
    else:
        options["cache"] = str(cache_of(arm.teacher or "tuned", room))
    if arm.objective == "features":
        options["labels"] = "none"
    started = time.process_time()
    result = train_student(train_config(None, options))
    seconds = time.process_time() - started
    student = load_trained_student(run / "last")
    export(run / "last", exported)
    backbone = load_backbone(exported, out_indices=setting.LEVELS)
    view = EvaluationConfig.of(student.spec)
    own_top1 = _own_top1(str(run / "last"), room) if student.spec.num_classes else None
    for folder in (run, exported):
        shutil.rmtree(folder)
    return Pretrained(
        student.model, backbone, view, result.samples_viewed, round(seconds, 1), own_top1
    )


def _own_top1(model: str, room: Room) -> float:
    metrics = evaluate(
        EvaluateConfig(model=model, data_dir=str(room.images / "pretrain"), workers=0, amp="auto")
    )
    top1: float = metrics["top1"]
    return top1


def _opened(teacher: str, room: Room) -> Pretrained:
    model = _model_of(teacher, room)
    opened = create_student(model, num_classes=0, img_size=setting.TEACHER_PX, pretrained=True)
    own_top1 = _own_top1(model, room) if teacher == "tuned" else None
    view = EvaluationConfig.of(opened.spec)
    return Pretrained(opened.model.eval(), None, view, own_top1=own_top1)


def _scratch(seed: int) -> Pretrained:
    torch.manual_seed(seed)
    kwargs = dict(setting.STUDENT_KWARGS)
    student = create_student(
        setting.STUDENT, num_classes=0, img_size=setting.STUDENT_PX, model_kwargs=kwargs
    )
    backbone = timm.create_model(
        setting.STUDENT, features_only=True, out_indices=setting.LEVELS, **kwargs
    )
    backbone.load_state_dict(student.model.state_dict())
    return Pretrained(student.model.eval(), backbone, EvaluationConfig.of(student.spec))


def cache_of(teacher: str, room: Room) -> Path:
    """Write the cache of a teacher, or complete it. Both have the same views."""
    folder = room.work / f"cache-{teacher}"
    options: dict[str, Any] = (
        {"labels": "none", "logits": "none"} if teacher == "headless" else {"logits": "full"}
    )
    cache_teacher(
        CacheTeacherConfig(
            teacher=TeacherConfig(
                model=_model_of(teacher, room), img_size=(setting.TEACHER_PX, setting.TEACHER_PX)
            ),
            data_dir=str(room.images / "pretrain"),
            split="few",
            output=folder,
            passes=room.passes,
            stages=(4,),
            aug=setting.AUG,
            codec="float16",
            precision="bf16" if choose_precision("auto") == "bf16" else "fp32",
            workers=0,
            **options,
        )
    )
    return folder


def _model_of(teacher: str, room: Room) -> str:
    return f"local-dir:{room.teacher if teacher == 'headless' else _tuned(room)}"


def _tuned(room: Room) -> Path:
    """Fine-tune the headless teacher on the students' images, and return the exported folder."""
    folder, run = room.work / "tuned", room.work / "tuning"
    if folder.exists():
        return folder
    shutil.rmtree(run, ignore_errors=True)
    train_student(
        train_config(
            None,
            {
                "model": f"local-dir:{room.teacher}",
                "model_kwargs": {"global_pool": "avg", "fc_norm": False},
                "pretrained": True,
                "objective": "none",
                "data_dir": str(room.images / "pretrain"),
                "split": "few",
                "val_split": None,
                "img_size": setting.TEACHER_PX,
                "aug": setting.AUG,
                "batch_size": setting.BATCH_SIZE,
                "warmup_epochs": 1,
                "workers": 0,
                "checkpoint_hist": 1,
                "output": str(run),
                **setting.TUNED,
            },
        )
    )
    export(run / "last", folder)
    shutil.rmtree(run)
    return folder
