"""What the training loop takes from its caller, and gives back."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from scalekd.training.targets import Batch

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Bare timm model to metrics, ``top1`` among them; collective, called by every process."""


class EpochLoader(Protocol):
    """A loader that knows its length and can start in the middle of an epoch."""

    @property
    def num_batches(self) -> int:
        """Batches that each process gets in one epoch."""

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterable[Batch]:
        """Batches of an epoch from ``start_batch`` on, in an order that only seeds decide."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        output: The run's folder.
        epochs: Epochs trained.
        samples_viewed: Views trained on.
        metrics: The last row of ``summary.csv``.
        best_epoch: The epoch of ``model_best``.
        best_metric: Its metric: top-1 where there is validation, otherwise minus the loss.
    """

    output: str
    epochs: int
    samples_viewed: int
    metrics: Mapping[str, float]
    best_epoch: int
    best_metric: float
