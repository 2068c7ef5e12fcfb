"""Measure a trained student, or any timm model, on a split.

scalekd evaluate ./run --data-dir /imagenet --split val
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from scalekd._model_build import build_model, preprocessing_of
from scalekd._model_names import describe_model
from scalekd.data import open_dataset
from scalekd.errors import UsageError
from scalekd.evaluation import EvaluationConfig, Evaluator
from scalekd.students import resolve_student_name
from scalekd.training import find_run_checkpoint, load_trained_student
from scalekd.training.precision import choose_precision


@dataclass(frozen=True)
class EvaluateConfig:
    """What ``scalekd evaluate`` was asked for.

    Attributes:
        model: A run's folder, a checkpoint in it, or a model by name.
        data_dir: Where the images are.
        split: Which of them.
        use_ema: Take the run's averaged weights.
        checkpoint: Weights on disk, for a model by name.
        img_size: Pixels, when not the model's own.
        crop_pct: Share of the resized side that is kept, when not the model's own.
        class_map: File with the model's class of each label, one a line.
        batch_size: Images a batch on each process.
        workers: Processes that decode images.
        amp: Precision.
    """

    model: str
    data_dir: str
    split: str = "val"
    use_ema: bool = False
    checkpoint: str | None = None
    img_size: int | None = None
    crop_pct: float | None = None
    class_map: Path | None = None
    batch_size: int = 128
    workers: int = 4
    amp: Literal["auto", "bf16", "fp16", "no"] = "no"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of the model, with what was measured.

    Raises:
        UsageError: No such run or model.
        DataError: No such split, a corrupt image, or labels that do not fit.
    """
    AcceleratorState._reset_state()  # Accelerate keeps a process's first precision otherwise
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # see make_accelerator
            mixed_precision=choose_precision(config.amp),
        )
    except ValueError as error:
        raise UsageError(f"--amp {config.amp}: {error}") from error
    model, view, name = _open_model(config)
    images = open_dataset(config.data_dir, config.split)
    evaluator = Evaluator(
        images,
        view,
        accelerator=accelerator,
        batch_size=config.batch_size,
        num_workers=config.workers,
        class_map=_read_class_map(config.class_map),
    )
    result = evaluator.evaluate(model.to(accelerator.device))
    accelerator.end_training()
    return {
        "model": name,
        "data": images.place,
        "img_size": list(view.img_size),
        "crop_pct": view.crop_pct,
        **asdict(result),
    }


def _open_model(config: EvaluateConfig) -> tuple[nn.Module, EvaluationConfig, str]:
    size = None if config.img_size is None else (config.img_size, config.img_size)
    run = Path(config.model)
    if find_run_checkpoint(run) is not None:
        student = load_trained_student(run, use_ema=config.use_ema)
        spec = student.spec
        view = EvaluationConfig(
            img_size=size or spec.img_size,
            mean=spec.mean,
            std=spec.std,
            crop_pct=config.crop_pct or spec.crop_pct,
            interpolation=spec.interpolation,
        )
        return student.model, view, str(student.checkpoint)
    if (run / "args.yaml").is_file():
        raise UsageError(f"{run}: this training run has written no checkpoint yet")
    if config.use_ema:
        raise UsageError(f"--use-ema: {config.model} is not a training run")
    source = describe_model(resolve_student_name(config.model)[0])
    kwargs = dict(source.model_args)
    if size is not None and source.pretrained_cfg.get("fixed_input_size"):
        kwargs["img_size"] = size
    model = build_model(source, pretrained=True, checkpoint=config.checkpoint, model_kwargs=kwargs)
    own = preprocessing_of(model)
    native = source.pretrained_cfg.get("input_size") or (3, 224, 224)
    view = EvaluationConfig(
        img_size=size or (int(native[1]), int(native[2])),
        mean=own.mean,
        std=own.std,
        crop_pct=config.crop_pct or own.crop_pct,
        interpolation=own.interpolation,
    )
    return model.eval(), view, source.label


def _read_class_map(path: Path | None) -> list[int] | None:
    if path is None:
        return None
    try:
        return [int(line) for line in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--class-map {path}: expected one class number a line: {error}"
        ) from error
