"""The teacher's tail of a Swin: outputs, and the gradient that passes through it."""

from math import isqrt
from typing import TYPE_CHECKING

import torch

from scalekd.teachers import Tail, TailConfig

if TYPE_CHECKING:
    from tests.conformance.conftest import Golden

KIND = "tpp"
_PIXELS_PER_TOKEN = 16  # of a Swin's third stage with patches of 4


def test_the_tail_equals_the_reference(golden: "Golden", dtype: torch.dtype) -> None:
    tail = _tail(golden).to(dtype)
    tokens = golden.leaf("in/tokens", dtype)
    merged: list[torch.Tensor] = []
    tail.get_submodule("model.layers.0.downsample").register_forward_hook(
        lambda module, inputs, output: merged.append(output.flatten(1, 2))
    )
    y = tail(tokens)
    terms = y * golden.tensor("in/R", dtype)
    terms.sum().backward()

    golden.assert_value(y, "out/y")
    golden.assert_gradient(tokens, "grad/tokens")
    golden.assert_value(merged[0], "mid/after_patch_merging", 1e-5)
    error = abs(terms.sum().item() - float(golden.arrays["out/loss"]))
    assert error <= golden.value_tolerance(dtype) * terms.abs().sum().item()
    assert all(parameter.grad is None for parameter in tail.parameters())


def test_published_order_of_merged_channels(golden: "Golden") -> None:
    stored = golden.arrays["perm/mmcls_to_timm_4C"]
    assert (golden.merged_channel_order(len(stored)) == stored).all()


def _tail(golden: "Golden") -> Tail:
    meta = golden.meta
    side = isqrt(golden.arrays["in/tokens"].shape[1]) * _PIXELS_PER_TOKEN
    tail = Tail.from_config(
        TailConfig(
            architecture="swin_tiny_patch4_window7_224",
            family="swin",
            model_kwargs={
                "embed_dim": meta["embed"],
                "depths": meta["depths"],
                "num_heads": meta["heads"],
                "window_size": meta["window"],
            },
            img_size=(side, side),
            num_classes=0,
            global_pool="avg",
        )
    )
    last = f"layers.{len(meta['depths']) - 1}."
    weights = {
        f"model.{name.replace(last, 'layers.0.')}": weight
        for name, weight in golden.timm_weights().items()
    }
    tail.load_state_dict(weights, strict=True)
    return tail
