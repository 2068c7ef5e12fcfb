"""The complete state of a training run, which can be saved and restored exactly."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from scalekd.distributed import Coordinator
from scalekd.errors import CacheMismatch, DataError
from scalekd.training.checkpoint import (
    EMA_FILE,
    OBJECTIVE_FILE,
    STUDENT_FILE,
    Checkpoint,
    Position,
    read_checkpoint,
)
from scalekd.training.module import DistillationModule
from scalekd.training.random_state import random_state, restore_random_state

# Hyperparameters follow the configuration of this launch; everything else in a group (LAMB and
# Lookahead count their steps there) belongs to the optimiser's state.
_CONFIGURED = ("lr", "initial_lr", "lr_scale", "weight_decay", "fused", "foreach")

# Raised when a state is damaged or was written by another program.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)

_WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+|(?<=\.)_orig_mod\.")


class TrainingState:
    """Student, projectors, average, optimiser and random states of one run.

    Args:
        accelerator: Accelerator of the run.
        module: Student and objective, not wrapped.
        optimizer: As prepared by Accelerate.
        ema: Average of the bare student, or None.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: DistillationModule,
        optimizer: Optimizer,
        ema: ModelEmaV3 | None,
    ) -> None:
        self._accelerator = accelerator
        self._module = module
        self._optimizer = optimizer
        self._ema = ema

    @property
    def student(self) -> nn.Module:
        """The bare timm model."""
        model: nn.Module = self._module.student.model  # type: ignore[assignment]
        return model

    def capture(
        self,
        position: Position,
        coordinator: Coordinator,
        *,
        meters: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> Checkpoint:
        """Capture the current state. Collective: every process adds its random states."""
        weights: dict[str, Mapping[str, Tensor]] = {
            STUDENT_FILE: plain_names(self.student.state_dict()),
            OBJECTIVE_FILE: plain_names(self._module.objective.state_dict()),
        }
        if self._ema is not None:
            weights[EMA_FILE] = plain_names(self._ema.module.state_dict())
        scaler = self._accelerator.scaler
        training = {
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random_states": coordinator.collect(random_state()),
            "meters": dict(meters),
        }
        return Checkpoint(position, weights, training, facts)

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Restore a captured state, also with another number of processes.

        Returns:
            Messages about parts that could not be restored exactly.

        Raises:
            DataError: The checkpoint's tensors are not those of this student and objective.
        """
        notes = []
        self._load(self.student, checkpoint, STUDENT_FILE)
        self._load(self._module.objective, checkpoint, OBJECTIVE_FILE)
        if self._ema is not None:
            self._load(self._ema.module, checkpoint, EMA_FILE)
        configured = [
            {name: group[name] for name in _CONFIGURED if name in group}
            for group in self._optimizer.param_groups
        ]
        try:
            saved = checkpoint.training["optimizer"]
            # Before loading: where a step counter lives depends on `fused`.
            groups = [
                {**group, **values}
                for group, values in zip(saved["param_groups"], configured, strict=True)
            ]
            self._optimizer.load_state_dict({**saved, "param_groups": groups})
        except _DAMAGED as error:
            raise DataError(
                f"the checkpoint's optimiser is not that of this run: {error}"
            ) from error
        try:
            notes += self._restore_generators(checkpoint.training)
        except _DAMAGED as error:
            raise DataError(
                f"the checkpoint's random states or gradient scaler are damaged: {error!r}"
            ) from error
        return notes

    def _restore_generators(self, training: Mapping[str, Any]) -> list[str]:
        """Restore scaler and random states; return messages about what could not be restored."""
        if self._accelerator.scaler is not None and training["scaler"]:
            self._accelerator.scaler.load_state_dict(training["scaler"])
        states = training["random_states"]
        if len(states) == self._accelerator.num_processes:
            restore_random_state(states[self._accelerator.process_index])
            return []
        return [
            f"the run had {len(states)} processes and has {self._accelerator.num_processes} "
            "now: random states start again and the rest of this epoch has another order, "
            "so the weights will not be those of an uninterrupted run"
        ]

    def _load(self, target: nn.Module, checkpoint: Checkpoint, name: str) -> None:
        try:
            target.load_state_dict(dict(checkpoint.weights[name]))
        except (KeyError, RuntimeError) as error:
            raise DataError(
                f"{name} of the checkpoint does not fit this {type(target).__name__}: {error}"
            ) from error

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Copy the main process's running statistics, so that all processes evaluate one model."""
        if self._accelerator.num_processes == 1:
            return
        models: list[nn.Module] = [self.student]
        if self._ema is not None:
            models.append(self._ema.module)
        for model in models:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)


def read_same_run(
    path: Path, facts: Mapping[str, Any], *, cache: str | None, has_teacher: bool
) -> Checkpoint:
    """Read a checkpoint; check that its run has the same teacher and images as this one.

    Args:
        path: Folder of the checkpoint.
        facts: Facts of this run, as stored in its checkpoints.
        cache: Location of this run's cache or images, for the message.
        has_teacher: Whether this run learns from a teacher.

    Raises:
        DataError: The checkpoint cannot be read.
        CacheMismatch: The checkpoint's run learns from another teacher or other images.
    """
    checkpoint = read_checkpoint(path)
    origins = {"data_fingerprint": "training images"}
    if has_teacher:
        origins["teacher_weights_sha256"] = "teacher's weights"
    for name, what in origins.items():
        was, now = checkpoint.facts.get(name), facts.get(name)
        if was and now and was != now:
            raise CacheMismatch(
                f"{path}: the run's {what} are {str(was)[:12]}…, and those of {cache} are "
                f"{str(now)[:12]}…; give --cache and --data-dir as the run was begun, or choose"
                " another --output (the weights can start a new run by --initial-checkpoint)"
            )
    return checkpoint


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip what compilation and data parallelism prepend to names."""
    return {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
