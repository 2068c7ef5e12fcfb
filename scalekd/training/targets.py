"""Sources of a batch's targets: the cache, a live teacher, or none.

A target source is a module that is called with the batch on the device. All sources return the
same record, so that the objective is the same for cached and live teachers.
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
    """Target source of the objective without a teacher."""

    groups: tuple[str, ...] = ()

    def forward(self, batch: Batch) -> Targets:
        return Targets()


class OnlineTargets(nn.Module):
    """Runs the teacher on the batch's pixels. A cache must give the same targets.

    Args:
        teacher: Frozen teacher, which normalises uint8 pixels itself.
        amp_dtype: Autocast type of the teacher's forward, or None for full precision.
        classes: The teacher's class of each class of the targets; all of the teacher's in its own
            order when ``None``.
        class_token: Whether to return the class token, which must be the first prefix token.
    """

    classes: Tensor | None
    groups: tuple[str, ...] = ()

    def __init__(
        self,
        teacher: Teacher,
        *,
        amp_dtype: torch.dtype | None = None,
        classes: Sequence[int] | None = None,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        selected = None if classes is None else torch.tensor(list(classes))
        self.register_buffer("classes", selected, persistent=False)
        self.teacher = teacher
        self._class_token = class_token
        self.amp_dtype = amp_dtype
        self._num_prefix_tokens = teacher.spec.stages[4].num_prefix_tokens

    @torch.no_grad()
    def forward(self, batch: Batch) -> Targets:
        """Compute targets, from ``teacher_pixels`` if the student's image size differs."""
        pixels = batch.get("teacher_pixels", batch["pixels"])
        cast = (
            torch.autocast(pixels.device.type, self.amp_dtype) if self.amp_dtype else nullcontext()
        )
        with cast:
            output = self.teacher(pixels)
        tokens = output.features[4].float()
        features = tokens[:, self._num_prefix_tokens :]
        class_token = tokens[:, 0] if self._class_token else None
        if output.logits is None:
            return Targets(features=features, class_token=class_token)
        logits = FullLogits(output.logits.float())
        selected = logits if self.classes is None else select_classes(logits, self.classes)
        return Targets(features=features, logits=selected, class_token=class_token)
