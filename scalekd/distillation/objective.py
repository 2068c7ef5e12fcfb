"""The base class of objectives, and the objectives without features: task loss, logit loss.

An objective returns its weighted terms and their sum, and declares which parts of the batch and of
the targets it reads, so that a trainer works with any of them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from scalekd.distillation.config import ScaleKDConfig
from scalekd.distillation.losses import TASK_LOSSES, kd_loss
from scalekd.distillation.targets import Targets
from scalekd.errors import UsageError


class Objective(nn.Module):
    """Base class of the objectives: task loss, logit loss, and the sum of all losses.

    A loss of weight 0 is not computed and returns no term.

    Args:
        config: Settings of the losses.
        task_weight: Weight of the task loss.
        kd_weight: Weight of the logit loss.

    Attributes:
        config: Settings of the losses.
        loss_names: Keys of the returned losses in their order, ``total`` last.
        needs_labels: Whether the objective reads labels.
        needs_logits: Whether the objective reads `Targets.logits`.
        needs_features: Whether the objective reads `Targets.features`.
        needs_pooled: Whether the objective reads the student's pooled features.
        contrasts_images: Whether a loss compares the images of a batch, so that it needs two.
        trains_classifier: Whether the objective reads the student's logits.
    """

    needs_features = False
    needs_pooled = False
    contrasts_images = False

    def __init__(self, config: ScaleKDConfig, *, task_weight: float, kd_weight: float) -> None:
        super().__init__()
        self.config = config
        self.needs_labels = task_weight > 0
        self.needs_logits = kd_weight > 0
        self._task_weight = task_weight
        self._kd_weight = kd_weight
        self._task_loss = TASK_LOSSES[config.task]

    @property
    def loss_names(self) -> tuple[str, ...]:
        return (*self._terms(), "total")

    @property
    def trains_classifier(self) -> bool:
        return self.needs_labels or self.needs_logits

    def forward(
        self,
        levels: Sequence[Float[Tensor, "batch channel row column"]],
        logits: Float[Tensor, "batch cls"],
        labels: Int64[Tensor, " batch"],
        targets: Targets,
        *,
        pooled: Float[Tensor, "batch feature"] | None = None,
        num_labelled: Float[Tensor, ""] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute the losses of a batch.

        Args:
            levels: The student's last two feature maps, stage 3 first.
            logits: The student's scores before softmax; not read if `trains_classifier` is false.
            labels: Class of each image; -1 for an image without a label, which is left out of the
                task loss only.
            targets: The teacher's outputs for the same views.
            pooled: The student's features before its classifier, if `needs_pooled`.
            num_labelled: Divisor of the summed task loss; by default the number of labelled images
                of this batch. If the gradients of several processes are averaged, give the mean of
                their numbers, so that the average is the mean over the labelled images of all.

        Returns:
            Weighted terms by name, float32 or better, and ``total``, their sum.

        Raises:
            ValueError: A part of ``targets`` is missing, or a shape is not the one that the
                objective was built for.
        """
        losses = self._classifier_losses(logits, labels, targets, num_labelled)
        losses |= self._feature_losses(levels, pooled, targets)
        return {**losses, "total": torch.stack(list(losses.values())).sum()}

    def _terms(self) -> tuple[str, ...]:
        task = ("task_loss",) if self.needs_labels else ()
        return (*task, *(("kd_loss",) if self.needs_logits else ()))

    def _classifier_losses(
        self, logits: Tensor, labels: Tensor, targets: Targets, num_labelled: Tensor | None
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if self.needs_labels:
            task = self._task_loss(
                logits,
                labels,
                label_smoothing=self.config.label_smoothing,
                num_labelled=num_labelled,
            )
            losses["task_loss"] = self._task_weight * task
        if self.needs_logits:
            if targets.logits is None:
                raise ValueError(
                    "the kd loss needs the teacher's logits and the targets have none; read them"
                    " from the cache, or turn the kd loss off"
                )
            kd = kd_loss(logits, targets.logits, temperature=self.config.temperature)
            losses["kd_loss"] = self._kd_weight * kd
        return losses

    def _feature_losses(
        self, levels: Sequence[Tensor], pooled: Tensor | None, targets: Targets
    ) -> dict[str, Tensor]:
        return {}


class PlainObjective(Objective):
    """The task loss alone, with weight 1: training without a teacher."""

    def __init__(self, config: ScaleKDConfig | None = None) -> None:
        super().__init__(config or ScaleKDConfig(), task_weight=1.0, kd_weight=0.0)


class KDObjective(Objective):
    """Task loss and logit loss (Hinton et al. 2015); needs logits, and labels below kd_alpha 1.

    Args:
        config: Settings; ``kd_alpha``, ``temperature`` and those of the task loss are used.

    Raises:
        UsageError: The logit loss is switched off or has weight 0.
    """

    def __init__(self, config: ScaleKDConfig | None = None) -> None:
        config = config or ScaleKDConfig()
        if config.kd_weight == 0:
            raise UsageError(
                f"the kd objective has nothing to distil with {config.kd = } and "
                f"{config.kd_alpha = }; give kd_alpha above 0, or choose the objective 'none'"
            )
        super().__init__(config, task_weight=config.task_weight, kd_weight=config.kd_weight)
