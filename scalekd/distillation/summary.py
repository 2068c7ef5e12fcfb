"""The projector of the summary loss, which compares pooled features with the teacher's class token.

A few channels of a class token are large and nearly the same for every image, so that they decide
its direction. Compared as it is, a constant already has a cosine near 0.7, and what differs between
images hardly counts. Without its mean, and with every channel of the same deviation, all of it
does; compare Miles et al., *Understanding the Role of the Projector in Knowledge Distillation*
(AAAI 2024), which normalises both sides by batch.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LEAST_VARIANCE = 1e-8  # of the channels' mean: constant channels stay at zero


class SummaryProjector(nn.Linear):
    """A linear layer, and the statistics of the summaries that its outputs are compared with.

    Mean and variance are those of all training targets so far, so that they depend on neither the
    size of a batch nor its other images. They are buffers: checkpoints contain them, and data
    parallelism takes those of the first process, which for a contrast count the targets of all.

    Args:
        student_features: Width of the student's pooled features.
        teacher_channels: Width of the teacher's summary.
        standardised: Whether `standardise` changes the target.
    """

    target_mean: Tensor
    target_variance: Tensor
    num_targets: Tensor

    def __init__(
        self, student_features: int, teacher_channels: int, *, standardised: bool, **factory: Any
    ) -> None:
        super().__init__(student_features, teacher_channels, **factory)
        self.standardised = standardised
        if standardised:
            self.register_buffer("target_mean", torch.zeros(teacher_channels))
            self.register_buffer("target_variance", torch.zeros(teacher_channels))
            self.register_buffer("num_targets", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def standardise(self, target: Float[Tensor, "batch channel"]) -> Float[Tensor, "batch channel"]:
        """Standardise the teacher's summaries; in training mode, count them first.

        Returns:
            Summaries of mean 0 and deviation 1 in every channel, or ``target`` if the projector
            was built without; zeros where all targets so far are equal.
        """
        if not self.standardised:
            return target
        target = target.to(self.target_mean.dtype)
        if self.training:
            self._count(target)
        variance = self.target_variance
        least = (_LEAST_VARIANCE * variance.mean()).clamp_min(torch.finfo(variance.dtype).tiny)
        return (target - self.target_mean) / (variance + least).sqrt()

    def _count(self, target: Tensor) -> None:
        """Combine the batch with the statistics so far (Chan et al. 1979)."""
        self.num_targets += len(target)
        share = (len(target) / self.num_targets).to(target.dtype)
        shift = target.mean(dim=0) - self.target_mean
        variance = target.var(dim=0, correction=0)
        variance = torch.lerp(self.target_variance, variance, share)
        self.target_variance.copy_(variance + share * (1 - share) * shift.square())
        self.target_mean.add_(share * shift)
