"""Stage two: a bare step, and ``train-student`` from the cache that `caching` wrote."""

import json
import shutil
import statistics

import torch

from benchmarks.gpu._setting import Setting, image_folder, milliseconds
from scalekd.pipelines.train_student import train_student
from scalekd.students import create_student
from scalekd.training import TrainConfig


def run(setting: Setting) -> None:
    rates: list[float] = []
    setting.part("training", "bare step", lambda: rates.append(_bare(setting)))
    cache = next(
        (
            setting.work / f"cache-{name}"
            for name in ("final", "both")
            if (setting.work / f"cache-{name}" / "manifest.json").exists()
        ),
        None,
    )
    if cache is None:
        setting.report("training", skipped="there is no complete cache")
        return
    for objective in ("none", "scalekd", "scalekd-light"):
        setting.part(
            "training",
            f"train-student, {objective}",
            lambda objective=objective: _train(setting, str(cache), objective, rates),  # type: ignore[misc]
            needs=20,
        )


def _model(setting: Setting) -> str:
    return "test_resnet" if setting.tiny else "resnet50"


def _batch(setting: Setting) -> int:
    return 8 if setting.tiny else 256


def _bare(setting: Setting) -> float:
    """Images a second of forward and backward, supervised, bf16, channels last."""
    student = create_student(_model(setting), num_classes=1000, img_size=setting.img_size)
    model = student.model.to(setting.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=setting.device.type == "cuda")
    size = (_batch(setting), 3, setting.img_size, setting.img_size)
    images = torch.randn(size, device=setting.device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (len(images),), device=setting.device)

    def step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16):
            scores = model(images)
        torch.nn.functional.cross_entropy(scores.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    cost = milliseconds(step, tiny=setting.tiny)
    rate = len(images) / cost * 1e3
    setting.report(
        "training",
        part="bare step",
        student=_model(setting),
        batch=len(images),
        milliseconds=round(cost, 2),
        images_per_second=round(rate),
    )
    return rate


def _train(setting: Setting, cache: str, objective: str, bare: list[float]) -> None:
    output = setting.work / f"run-{objective}"
    shutil.rmtree(output, ignore_errors=True)
    train_student(
        TrainConfig.from_mapping(
            {
                "model": _model(setting),
                "cache": cache,
                "data_dir": str(image_folder(setting)),
                "val_split": None,
                "objective": objective,
                "epochs": 2,
                "batch_size": _batch(setting),
                "workers": setting.num_workers,
                "output": str(output),
                "log_interval": 2 if setting.tiny else 10,
                "lr": 1e-4,
            },
            source="the check",
        )
    )
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steady = rows[len(rows) // 2 :]
    rate = statistics.median(row["images_per_second"] for row in steady)
    setting.report(
        "training",
        part="train-student",
        student=_model(setting),
        objective=objective,
        images_per_second=round(rate),
        over_bare=round(bare[0] / rate, 3) if bare else None,
        data_wait_share=round(statistics.median(row["data_wait_share"] for row in steady), 3),
        loss=rows[-1]["loss"],
    )
    shutil.rmtree(output)
