"""Types of the training loop's arguments and result."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from scalekd.text import counted
from scalekd.training.random_state import preserved_random_state
from scalekd.training.targets import Batch

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Function of a bare timm model that returns metrics by name; called by every process."""


Choose = Callable[[Mapping[str, float]], float | None]
"""Function of an epoch's metrics that is largest for the best epoch; ``None`` if not measured."""


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
        """Number of batches of each process in an epoch."""

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterable[Batch]:
        """Return the batches of an epoch from ``start_batch`` on; only seeds decide their order."""


SCORES = {
    "eval_top1": ("top-1", " %"),
    "eval_top5": ("top-5", " %"),
    "ema_eval_top1": ("top-1 of the averaged weights", " %"),
    "eval_knn_top1": ("neighbours' top-1", " %"),
    "ema_eval_knn_top1": ("neighbours' top-1 of the averaged weights", " %"),
    "eval_feature_loss": ("validation feature loss", ""),
    "ema_eval_feature_loss": ("validation feature loss of the averaged weights", ""),
}
"""Label and unit of each metric of an epoch that is shown to people, by its name."""


def score_texts(row: Mapping[str, float]) -> list[str]:
    """Return the metrics of an epoch that are shown to people, such as ``top-1 71.20 %``."""
    return [
        f"{label} {row[name]:.2f}{unit}" for name, (label, unit) in SCORES.items() if name in row
    ]


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

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
        loss = f"loss {self.metrics['train_loss']:.4g}"
        return [
            f"{self.output}: {counted(self.epochs, 'epoch')}, {self.samples_viewed:,} views, "
            + ", ".join([loss, *score_texts(self.metrics)]),
            f"best: epoch {self.best_epoch + 1}, in {self.output}/model_best",
        ]
