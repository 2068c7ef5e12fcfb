"""Top-1 and top-5 of a model on a split, with every sample counted exactly once.

Processes exchange only their counts, at the end, so that the result is the same for every number
of processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.distributed import Coordinator
from scalekd.errors import DataError, UsageError
from scalekd.evaluation.teacher import Answers
from scalekd.evaluation.views import EvaluationBatch, EvaluationConfig, EvaluationViews


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a model on an image set.

    Attributes:
        top1: Percent of samples whose class has the highest score.
        top5: Percent of samples whose class is among the five highest scores.
        loss: Mean cross entropy in nats.
        num_samples: Number of samples.
        teacher_agreement: Percent of samples for which model and teacher predict the same class.
        teacher_top1: Top-1 of the teacher on the same samples.
    """

    top1: float
    top5: float
    loss: float
    num_samples: int
    teacher_agreement: float | None = None
    teacher_top1: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return the measured metrics by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Evaluator:
    """A function that evaluates models on one image set; call it in every process.

    Args:
        views: Evaluation views of the image set.
        config: Size and preprocessing of the models' input.
        class_map: The model's class of each label, for a subset of the model's classes. Other
            classes are ignored; see `scalekd.models.classes`.
        answers: The teacher's class of every sample, numbered like the labels; -1 for samples of
            other processes.

    Raises:
        UsageError: ``class_map`` does not fit the labels.
    """

    def __init__(
        self,
        views: EvaluationViews,
        config: EvaluationConfig,
        *,
        class_map: Sequence[int] | None = None,
        answers: Answers | None = None,
    ) -> None:
        if class_map is not None and views.num_classes > len(class_map):
            raise UsageError(
                f"the class map has {len(class_map)} lines, but {views.images.location} has label "
                f"{views.num_classes - 1}; it needs a line for every label"
            )
        self._views = views
        self._config = config
        self._coordinator = Coordinator(views.accelerator.num_processes)
        self._class_map = None if class_map is None else torch.tensor(list(class_map))
        self._answers = None if answers is None else torch.from_numpy(answers)

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        """Return the metrics by name; see `evaluate`."""
        return self.evaluate(model).metrics()

    def evaluate(self, model: nn.Module) -> EvaluationResult:
        """Evaluate a bare timm model in eval mode; its mode is restored afterwards.

        Raises:
            DataError: An image is corrupt, or a label is beyond the model's classes.
        """
        was_training = model.training
        model.eval()
        try:
            counts = self._coordinator.together(lambda: self._count(model))
        finally:
            model.train(was_training)
        shares = self._coordinator.collect(counts)
        number, first, fifth, loss, *agreed = (sum(column) for column in zip(*shares, strict=True))
        return EvaluationResult(
            100 * first / number,
            100 * fifth / number,
            loss / number,
            int(number),
            *(100 * count / number for count in agreed),
        )

    @torch.inference_mode()
    def _count(self, model: nn.Module) -> list[float]:
        """Return the numbers of samples, hits at 1 and 5, the summed loss, and teacher hits."""
        totals = torch.zeros(4 if self._answers is None else 6, dtype=torch.float64)
        for batch in self._views.batches(self._config):
            with self._views.accelerator.autocast():
                logits = model(batch.images)
            totals += self._score(logits.float(), batch).cpu()
        return [float(total) for total in totals]

    def _score(self, logits: Tensor, batch: EvaluationBatch) -> Tensor:
        location, labels = self._views.images.location, batch.labels
        if self._class_map is not None:
            if int(self._class_map.max()) >= logits.shape[1]:
                raise UsageError(
                    f"the class map has class {int(self._class_map.max())}, but the model has "
                    f"{logits.shape[1]} classes"
                )
            logits = logits[:, self._class_map.to(logits.device)]
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"{location}: label {int(labels.max())} is beyond the model's "
                f"{logits.shape[1]} classes; it was trained on another set of classes"
            )
        ranked = logits.topk(min(5, logits.shape[1])).indices
        hits = ranked == labels[:, None]
        number = torch.tensor(float(len(labels)), device=logits.device)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = [number, hits[:, 0].sum(), hits.sum(), loss]
        if self._answers is not None:
            answers = self._answers[list(batch.positions)].to(logits.device)
            counts += [(ranked[:, 0] == answers).sum(), (answers == labels).sum()]
        return torch.stack(counts).double()
