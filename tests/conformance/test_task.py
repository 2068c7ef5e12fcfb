"""The student's own losses and their gradients."""

from typing import TYPE_CHECKING

import torch

from scalekd.distillation import TASK_LOSSES

if TYPE_CHECKING:
    from tests.conformance.conftest import Golden

KIND = "task"
_LOSSES = {"ce": ("cross_entropy", 0.0), "ls": ("cross_entropy", 0.1), "bce": ("bce", 0.0)}


def test_the_task_loss_equals_the_reference(golden: "Golden", dtype: torch.dtype) -> None:
    which = golden.meta["which"]
    name, label_smoothing = _LOSSES[which]
    logits = golden.leaf("in/logits", dtype)
    loss = TASK_LOSSES[name](logits, golden.tensor("in/labels"), label_smoothing=label_smoothing)
    loss.backward()

    # The published soft targets are float32 even in the float64 run.
    tolerance = 1e-6 if which != "ce" and dtype == torch.float64 else None
    golden.assert_value(loss, "out/loss", tolerance)
    golden.assert_gradient(logits, "grad/logits")
