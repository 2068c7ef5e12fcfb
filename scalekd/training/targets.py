"""Where the targets of a batch come from: the cache, a live teacher, or nowhere.

A target source is a module called with the batch on the device; what it returns is the same
record in every case, so that the objective cannot tell a cached run from an online one.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from scalekd.distillation import FullLogits, Targets, select_classes
from scalekd.teachers import Teacher

Batch = Mapping[str, Tensor]
"""``pixels`` uint8 ``(batch, 3, row, column)``, ``label`` int64 ``(batch,)``, and target planes."""


class NoTargets(nn.Module):
    """For the objective that has no teacher."""

    groups: tuple[str, ...] = ()

    def forward(self, batch: Batch) -> Targets:
        return Targets()


class OnlineTargets(nn.Module):
    """The teacher itself, run on the batch's pixels: the reference that a cache must agree with.

    Args:
        teacher: Frozen; normalises uint8 pixels as it was trained with.
        amp_dtype: Autocast type of its forward, or None for full precision.
        classes: The teacher's class of each class of the targets; all of the teacher's in its own
            order when ``None``.
    """

    classes: Tensor | None
    groups: tuple[str, ...] = ()

    def __init__(
        self,
        teacher: Teacher,
        *,
        amp_dtype: torch.dtype | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        selected = None if classes is None else torch.tensor(list(classes))
        self.register_buffer("classes", selected, persistent=False)
        self.teacher = teacher
        self.amp_dtype = amp_dtype
        self._num_prefix_tokens = teacher.spec.stages[4].num_prefix_tokens

    @torch.no_grad()
    def forward(self, batch: Batch) -> Targets:
        """Targets of the batch; ``teacher_pixels`` are used where the student's size is another."""
        pixels = batch.get("teacher_pixels", batch["pixels"])
        cast = (
            torch.autocast(pixels.device.type, self.amp_dtype) if self.amp_dtype else nullcontext()
        )
        with cast:
            output = self.teacher(pixels)
        features = output.features[4][:, self._num_prefix_tokens :].float()
        if output.logits is None:
            return Targets(features=features)
        logits = FullLogits(output.logits.float())
        selected = logits if self.classes is None else select_classes(logits, self.classes)
        return Targets(features=features, logits=selected)
