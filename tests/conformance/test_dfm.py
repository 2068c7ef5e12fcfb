"""The two feature losses and their gradients."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from scalekd.distillation import frequency_loss, spatial_loss

if TYPE_CHECKING:
    from tests.conformance.conftest import Golden

KIND = "dfm"


def test_the_spatial_loss_equals_the_reference(golden: "Golden", dtype: torch.dtype) -> None:
    alpha = float(golden.tensor("in/alpha", torch.float64)[0])
    preds = golden.leaf("in/preds", dtype)
    loss = alpha * spatial_loss(preds, _target_tokens(golden, dtype))
    loss.backward()

    golden.assert_value(loss, "out/spat")
    singular = _singular(golden.arrays["in/preds"])
    for sample, token in golden.meta["zero_pred_tokens"]:
        assert singular[sample, token]
    _assert_gradient(golden, preds, "grad/spat_preds", singular)


def test_the_frequency_loss_equals_the_reference(golden: "Golden", dtype: torch.dtype) -> None:
    alpha = float(golden.tensor("in/alpha", torch.float64)[1])
    preds = golden.leaf("in/preds", dtype)
    loss = alpha * frequency_loss(preds, _target_tokens(golden, dtype))
    loss.backward()

    assert torch.isfinite(loss)
    assert preds.grad is not None
    assert torch.isfinite(preds.grad).all()
    if golden.meta["unstable"]:  # a constant map: the published figures are rounding noise
        return
    golden.assert_value(loss, "out/freq")
    tokens = golden.arrays["in/preds"].astype(np.float64)
    centred = tokens - tokens.mean(axis=1, keepdims=True)
    _assert_gradient(golden, preds, "grad/freq_preds", _singular(centred))


def _target_tokens(golden: "Golden", dtype: torch.dtype) -> torch.Tensor:
    return golden.tensor("in/targets", dtype).flatten(2).transpose(1, 2)


def _singular(tokens: np.ndarray) -> np.ndarray:
    """Tokens of length zero, where the published gradient is the inverse of a constant."""
    return np.linalg.norm(tokens.astype(np.float64), axis=2) < 1e-9


def _assert_gradient(
    golden: "Golden", preds: torch.Tensor, name: str, singular: np.ndarray
) -> None:
    assert preds.grad is not None
    gradient = preds.grad.double().numpy()
    assert (gradient[singular] == 0).all()
    expected = golden.arrays[name].astype(np.float64)
    if golden.meta["zero_grad_in_exact_arithmetic"]:
        assert np.abs(gradient[~singular]).max() < 1e-4
        return
    # Published gradients of these two kinds of data are small differences of large numbers.
    delicate = golden.meta["data"] in ("dcheavy", "corr")
    tolerance = {torch.float64: 2e-6, torch.float32: 1e-4 if delicate else 5e-5}[preds.dtype]
    scale = np.abs(expected[~singular]).max(initial=0)
    error = np.abs(gradient - expected)[~singular].max(initial=0)
    assert error <= tolerance * scale, f"{name}: error {error:.2e} at scale {scale:.2e}"
