"""What a checkpoint's weights are: enough to evaluate or export them with no other file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scalekd.errors import DataError, UsageError
from scalekd.students import StudentSpec
from scalekd.training.checkpoint import EMA_FILE, STATE_FILE, STUDENT_FILE, find_run_checkpoint


class TrainedStudent:
    """The weights of a checkpoint as a bare timm model, in eval mode on the CPU.

    Attributes:
        checkpoint: Folder they came from.
        spec: What they are.
        class_names: Where the data set names its classes.
        state: All of the checkpoint's ``state.json``.
        model: The model.
    """

    def __init__(
        self, checkpoint: Path, spec: StudentSpec, state: Mapping[str, Any], model: nn.Module
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.class_names: tuple[str, ...] | None = (
            tuple(state["class_names"]) if state.get("class_names") else None
        )
        self.state = state
        self.model = model


def load_trained_student(run: Path, *, use_ema: bool = False) -> TrainedStudent:
    """Open a run's best checkpoint, its last where there is no best, or a checkpoint folder.

    Args:
        run: ``R``, or a checkpoint inside it such as ``R/checkpoint-7``.
        use_ema: Take the averaged weights.

    Raises:
        UsageError: No checkpoint is there, or it has no averaged weights.
        DataError: The checkpoint is damaged.
    """
    checkpoint = find_run_checkpoint(run)
    if checkpoint is None:
        raise UsageError(f"{run}: neither a training run with a checkpoint, nor a checkpoint")
    weights = checkpoint / (EMA_FILE if use_ema else STUDENT_FILE)
    if not weights.is_file():
        raise UsageError(
            f"{checkpoint}: has no averaged weights; train with --model-ema, or leave --use-ema out"
        )
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        spec = StudentSpec.model_validate(state["student"])
        model = build_student_model(spec)
        model.load_state_dict(load_file(weights))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ValidationError) as error:
        raise DataError(
            f"{checkpoint}: the student cannot be read ({type(error).__name__}: {error})"
        ) from error
    return TrainedStudent(checkpoint, spec, state, model.eval())


def student_facts(spec: StudentSpec, class_names: Sequence[str] | None) -> dict[str, Any]:
    """What a run keeps with its checkpoints about the student; `load_trained_student` reads it."""
    names = None if class_names is None else list(class_names)
    return {"student": spec.model_dump(mode="json"), "class_names": names}


def build_student_model(spec: StudentSpec) -> nn.Module:
    """The bare timm model with random weights."""
    model: nn.Module = timm.create_model(
        spec.architecture, pretrained=False, num_classes=spec.num_classes, **spec.model_kwargs
    )
    return model
