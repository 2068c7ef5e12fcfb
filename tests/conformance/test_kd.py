"""The logit loss and its gradient."""

from typing import TYPE_CHECKING

import torch

from scalekd.distillation import kd_loss

if TYPE_CHECKING:
    from tests.conformance.conftest import Golden

KIND = "kd"


def test_the_kd_loss_equals_the_reference(golden: "Golden", dtype: torch.dtype) -> None:
    alpha, temperature = golden.meta["alpha"], golden.meta["temp"]
    student = golden.leaf("in/logit_s", dtype)
    loss = kd_loss(student, golden.tensor("in/logit_t", dtype), temperature=temperature)
    (alpha * loss).backward()

    golden.assert_value(alpha * loss, "out/loss")
    golden.assert_gradient(student, "grad/logit_s")
    assert float(golden.arrays["out/ori_weight"]) == 1 - alpha
