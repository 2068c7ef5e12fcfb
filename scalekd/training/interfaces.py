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

    def lines(self) -> list[str]:
        """Return the lines to print."""
        labels = {"eval_top1": "top-1", "ema_eval_top1": "top-1 of the average"}
        scores = [
            f", {label} {self.metrics[name]:.2f} %"
            for name, label in labels.items()
            if name in self.metrics
        ]
        return [
            f"{self.output}: {self.epochs} epochs, {self.samples_viewed:,} views, "
            f"loss {self.metrics['train_loss']:.4g}" + "".join(scores),
            f"best: epoch {self.best_epoch + 1}, in {self.output}/model_best",
        ]
