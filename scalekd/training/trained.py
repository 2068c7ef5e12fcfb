"""Loads a checkpoint's student for evaluation or export without any other file."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scalekd.errors import DataError, UsageError
from scalekd.models.build import build_described, check_described
from scalekd.models.weights import stored_shapes
from scalekd.students import StudentSpec
from scalekd.training.checkpoint import (
    EMA_FILE,
    STUDENT_FILE,
    check_file,
    find_run_checkpoint,
    read_state,
)

_MAX_PIXELS = 4096
_MAX_SETTINGS = 256_000


@dataclass
class TrainedStudent:
    """The weights of a checkpoint as a bare timm model, in eval mode on the CPU.

    Attributes:
        checkpoint: Folder of the checkpoint.
        spec: Architecture, classes and image size of the student.
        state: Content of the checkpoint's ``state.json``.
        model: The model.
    """

    checkpoint: Path
    spec: StudentSpec
    state: Mapping[str, Any]
    model: nn.Module

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, if the data set has them."""
        return tuple(self.state.get("class_names") or ()) or None


class DescribedStudent(NamedTuple):
    """A checkpoint's student without its weights.

    Attributes:
        spec: Architecture, classes and image size of the student.
        class_names: Names of the classes, if the data set has them.
        weights: File of the weights.
    """

    spec: StudentSpec
    class_names: tuple[str, ...] | None
    weights: Path


def describe_trained_student(run: Path) -> DescribedStudent:
    """Describe the student of a run's best checkpoint, its last, or of a checkpoint folder.

    The description fits the weights, so that a model built from it is about as large as their file.

    Raises:
        UsageError: No checkpoint is there.
        DataError: The checkpoint is damaged.
    """
    checkpoint, state = _read(run)
    weights = check_file(checkpoint, state, STUDENT_FILE)
    with _readable_student(checkpoint):
        facts = _Facts.model_validate(state)
        spec = facts.student
        arguments = {"num_classes": spec.num_classes, **spec.model_kwargs}
        check_described(spec.architecture, arguments, stored_shapes(weights))
    return DescribedStudent(spec, tuple(facts.class_names or ()) or None, weights)


def load_trained_student(run: Path, *, use_ema: bool = False) -> TrainedStudent:
    """Open a run's best checkpoint, its last where there is no best, or a checkpoint folder.

    Args:
        run: ``R``, or a checkpoint inside it such as ``R/checkpoint-7``.
        use_ema: Take the averaged weights.

    Raises:
        UsageError: No checkpoint is there, or it has no averaged weights.
        DataError: The checkpoint is damaged.
    """
    checkpoint, state = _read(run)
    name = EMA_FILE if use_ema else STUDENT_FILE
    if use_ema and not (checkpoint / name).is_file():
        raise UsageError(
            f"{checkpoint}: has no averaged weights; train with --model-ema, or leave --use-ema out"
        )
    weights = check_file(checkpoint, state, name)
    with _readable_student(checkpoint):
        spec = _Facts.model_validate(state).student
        model = build_described(
            spec.architecture,
            {"num_classes": spec.num_classes, **spec.model_kwargs},
            stored_shapes(weights),
        )
        model.load_state_dict(load_file(weights))
    return TrainedStudent(checkpoint, spec, state, model.eval())


def _read(run: Path) -> tuple[Path, dict[str, Any]]:
    checkpoint = find_run_checkpoint(run)
    if checkpoint is None:
        raise UsageError(f"{run}: neither a training run with a checkpoint, nor a checkpoint")
    return checkpoint, read_state(checkpoint)


@contextmanager
def _readable_student(checkpoint: Path) -> Iterator[None]:
    try:
        yield
        return
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:200]
        reason = f"{where}: {first['msg']}"
    except (UsageError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise DataError(f"{checkpoint}: the student cannot be read ({' '.join(reason.split())[:600]})")


_Text = Annotated[str, Field(max_length=10_000)]
_Name = Annotated[str, Field(max_length=500)]


class _Facts(BaseModel):
    """Validated content of a checkpoint's ``state.json``, which may be untrusted."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    student: StudentSpec
    class_names: Annotated[list[_Name], Field(max_length=100_000)] | None = None
    objective: _Text | None = None
    teacher: _Text | None = None
    teacher_weights_sha256: _Text | None = None
    teacher_licence: _Text | None = None
    teacher_note: _Text | None = None
    cache_id: _Text | None = None
    data_fingerprint: _Text | None = None
    data_licence: _Text | None = None
    logits_of: Annotated[list[_Name], Field(max_length=1000)] = []
    software: Annotated[dict[_Name, _Text], Field(max_length=1000)] = {}
    metrics: Annotated[dict[_Name, float], Field(max_length=1000)] = {}
    settings: dict[_Name, Any] = {}

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        spec = self.student
        if not all(1 <= pixels <= _MAX_PIXELS for pixels in spec.img_size):
            raise ValueError(f"an image size of {spec.img_size}, beyond {_MAX_PIXELS} pixels")
        numbers = (*spec.mean, *spec.std, spec.crop_pct)
        if not all(map(math.isfinite, numbers)) or min(*spec.std, spec.crop_pct) <= 0:
            raise ValueError("mean, std and crop_pct must be finite, std and crop_pct positive")
        if len(json.dumps(self.settings)) > _MAX_SETTINGS:
            raise ValueError(f"settings of more than {_MAX_SETTINGS:,} characters")
        recipe = self.settings.get("recipe")
        if recipe is not None and (not isinstance(recipe, str) or "\0" in recipe):
            raise ValueError("settings.recipe is not a name")
        return self


def student_facts(spec: StudentSpec, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Describe the student for the checkpoints of a run; `load_trained_student` reads it."""
    names = None if class_names is None else list(class_names)
    return {"student": spec.model_dump(mode="json"), "class_names": names}
