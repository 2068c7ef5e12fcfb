"""The cross attention projector: outputs, all gradients, batch statistics."""

from typing import TYPE_CHECKING

import pytest
import torch

from scalekd.distillation import CrossAttentionProjector

if TYPE_CHECKING:
    from tests.conformance.conftest import Golden

KIND = "cap"


def test_the_projector_equals_the_reference(golden: "Golden", dtype: torch.dtype) -> None:
    settings = golden.meta["cfg"]
    if tuple(settings["window_shapes"]) != (1, 1):
        pytest.skip("windowed attention is a quirk of the published code that no recipe uses")
    exact = _Run(golden, torch.float64)
    run = exact if dtype == torch.float64 else _Run(golden, dtype, same_side_as=exact)

    golden.assert_value(run.y, "out/y")
    golden.assert_gradient(run.x, "grad/x")
    if run.query is not None:
        golden.assert_gradient(run.query, "grad/query")
    golden.assert_projector(run.projector)
    # The scalar sums terms of both signs: its rounding scales with them, not with the sum.
    error = abs(run.terms.sum().item() - float(golden.arrays["out/loss"]))
    assert error <= golden.value_tolerance(dtype) * run.terms.abs().sum().item()


class _Run:
    def __init__(
        self, golden: "Golden", dtype: torch.dtype, same_side_as: "_Run | None" = None
    ) -> None:
        settings = golden.meta["cfg"]
        self.x = golden.leaf("in/x", dtype)
        self.query = golden.leaf("in/query", dtype) if "in/query" in golden.names else None
        self.projector = CrossAttentionProjector(
            student_channels=self.x.shape[1],
            student_grid=(self.x.shape[2], self.x.shape[3]),
            teacher_channels=golden.arrays["out/y"].shape[2],
            query_grid=tuple(settings["query_hw"]),
            num_heads=settings["num_heads"],
            softmax_scale=settings["softmax_scale"],
            norm="layer" if settings["variant"] == "convnext" else "batch",
            learned_query=self.query is None,  # given queries win, whatever self_query says
        )
        golden.load_projector(self.projector)
        self.projector.to(dtype).train(settings["bn_mode"] == "train")
        self.relu_inputs = golden.relu_inputs(self.projector)
        if same_side_as is not None:
            self.relu_inputs.pin_to(same_side_as.relu_inputs)

        self.y = self.projector(self.x, self.query)
        terms = self.y * golden.tensor("in/R", dtype)
        terms.sum().backward()
        self.terms = terms.detach()
