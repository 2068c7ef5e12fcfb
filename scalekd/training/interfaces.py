"""What the training loop takes from its caller, and gives back."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from scalekd.training.random_state import preserved_random_state
from scalekd.training.targets import Batch

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Bare timm model to metrics by name; collective, called by every process."""


Choose = Callable[[Mapping[str, float]], float | None]
"""An epoch's row to the number that is highest for the best epoch; ``None`` if not measured."""


def by_metric(name: str, *, sign: int = 1) -> Choose:
    """Choose by a metric of the evaluation: that of the averaged weights, if there are any.

    Args:
        name: Name of the metric.
        sign: -1 if lower is better.
    """

    def choose(row: Mapping[str, float]) -> float | None:
        value = row.get(f"ema_eval_{name}", row.get(f"eval_{name}"))
        return None if value is None else sign * value

    return choose


def by_training_loss(row: Mapping[str, float]) -> float:
    """Choose the epoch of the lowest training loss."""
    return -row["train_loss"]


def last_epoch(row: Mapping[str, float]) -> float:
    """Choose the last epoch."""
    return row["epoch"]


def evaluated(
    evaluate: Evaluate, student: nn.Module, average: nn.Module | None
) -> dict[str, float]:
    """Evaluate the student and, if there is one, the average of its weights.

    Returns:
        Metrics named ``eval_…`` and ``ema_eval_…``.
    """
    row: dict[str, float] = {}
    for prefix, model in (("eval", student), ("ema_eval", average)):
        if model is None:
            continue
        with preserved_random_state():
            metrics = evaluate(model)
        # Plain numbers: a NumPy one in a checkpoint could not be read back safely.
        row |= {f"{prefix}_{name}": float(value) for name, value in metrics.items()}
    return row


class EpochLoader(Protocol):
    """A loader that knows its length and can start in the middle of an epoch."""

    @property
    def num_batches(self) -> int:
        """Batches that each process gets in one epoch."""

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterable[Batch]:
        """Batches of an epoch from ``start_batch`` on, in an order that only seeds decide."""


_SCORES = {
    "eval_top1": ("top-1", " %"),
    "ema_eval_top1": ("top-1 of the average", " %"),
    "eval_knn_top1": ("top-1 of nearest neighbours", " %"),
    "ema_eval_knn_top1": ("top-1 of the average's neighbours", " %"),
    "eval_feature_loss": ("validation feature loss", ""),
    "ema_eval_feature_loss": ("feature loss of the average", ""),
}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        output: The run's folder.
        epochs: Epochs trained.
        samples_viewed: Views trained on.
        metrics: The last row of ``summary.csv``.
        best_epoch: The epoch of ``model_best``.
        best_metric: Its metric: top-1 where there is validation, otherwise minus the loss; without
            labels top-1 of the nearest neighbours, minus the validation feature loss, or the number
            of the epoch.
    """

    output: str
    epochs: int
    samples_viewed: int
    metrics: Mapping[str, float]
    best_epoch: int
    best_metric: float

    def lines(self) -> list[str]:
        """Return the lines to print."""
        scores = [
            f", {label} {self.metrics[name]:.2f}{unit}"
            for name, (label, unit) in _SCORES.items()
            if name in self.metrics
        ]
        return [
            f"{self.output}: {self.epochs} epochs, {self.samples_viewed:,} views, "
            f"loss {self.metrics['train_loss']:.4g}" + "".join(scores),
            f"best: epoch {self.best_epoch + 1}, in {self.output}/model_best",
        ]
