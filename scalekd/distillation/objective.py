"""The base class of objectives, and the objectives without features: task loss, logit loss.

An objective returns its weighted terms and their sum, and declares which parts of the targets it
reads, so that a trainer works with any of them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from scalekd.distillation.config import ScaleKDConfig
from scalekd.distillation.losses import TASK_LOSSES, soft_cross_entropy
from scalekd.distillation.targets import Targets
from scalekd.errors import UsageError


class Objective(nn.Module):
    """Base class of the objectives: the task loss, and the sum of all losses.

    Attributes:
        config: Settings of the losses.
        loss_names: Keys of the returned losses in their order, ``total`` last.
        needs_features: Whether the objective reads `Targets.features`.
        needs_logits: Whether the objective reads `Targets.logits`.
    """

    needs_features = False
    needs_logits = False

    def __init__(self, config: ScaleKDConfig, *, task_weight: float) -> None:
        super().__init__()
        self.config = config
        self._task_weight = task_weight
        self._task_loss = TASK_LOSSES[config.task]

    @property
    def loss_names(self) -> tuple[str, ...]:
        return (*self._terms(), "total")

    def forward(
        self,
        levels: Sequence[Float[Tensor, "batch channel row column"]],
        logits: Float[Tensor, "batch cls"],
        labels: Int64[Tensor, " batch"],
        targets: Targets,
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute the losses of a batch.

        Args:
            levels: The student's last two feature maps, stage 3 first.
            logits: The student's scores before softmax.
            labels: Class of each image.
            targets: The teacher's outputs for the same views.

        Returns:
            Weighted terms by name, float32 or better, and ``total``, their sum.

        Raises:
            ValueError: A part of ``targets`` is missing, or a shape is not the one that the
                objective was built for.
        """
        losses = self._losses(levels, logits, labels, targets)
        return {**losses, "total": torch.stack(list(losses.values())).sum()}

    def _terms(self) -> tuple[str, ...]:
        return ("task_loss",)

    def _losses(
        self, levels: Sequence[Tensor], logits: Tensor, labels: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        smoothing = self.config.label_smoothing
        task = self._task_loss(logits, labels, label_smoothing=smoothing)
        return {"task_loss": self._task_weight * task}


class PlainObjective(Objective):
    """The task loss alone, with weight 1: training without a teacher."""

    def __init__(self, config: ScaleKDConfig | None = None) -> None:
        super().__init__(config or ScaleKDConfig(), task_weight=1.0)


class KDObjective(Objective):
    """Task loss and logit loss (Hinton et al. 2015); needs logits only.

    Args:
        config: Settings; ``kd_alpha``, ``temperature`` and those of the task loss are used.

    Raises:
        UsageError: The logit loss is switched off or has weight 0.
    """

    needs_logits = True

    def __init__(self, config: ScaleKDConfig | None = None) -> None:
        config = config or ScaleKDConfig()
        if config.kd_weight == 0:
            raise UsageError(
                f"the kd objective has nothing to distil with {config.kd = } and "
                f"{config.kd_alpha = }; give kd_alpha above 0, or choose the objective 'none'"
            )
        super().__init__(config, task_weight=config.task_weight)

    def _terms(self) -> tuple[str, ...]:
        return (*super()._terms(), "kd_loss")

    def _losses(
        self, levels: Sequence[Tensor], logits: Tensor, labels: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        losses = super()._losses(levels, logits, labels, targets)
        return {**losses, "kd_loss": weighted_kd_loss(self.config, logits, targets)}


def weighted_kd_loss(config: ScaleKDConfig, logits: Tensor, targets: Targets) -> Tensor:
    """Compute the logit loss times its weight."""
    if targets.logits is None:
        raise ValueError(
            "the kd loss needs the teacher's logits and the targets have none; read them from "
            "the cache, or turn the kd loss off"
        )
    loss = soft_cross_entropy(logits, targets.logits, temperature=config.temperature)
    return config.kd_weight * loss
