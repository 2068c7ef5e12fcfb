"""The spatial and frequency losses, where their value can be worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scalekd.distillation import (
    ScaleKDConfig,
    ScaleKDObjective,
    Targets,
    feature_terms,
    frequency_loss,
    spatial_loss,
)
from scalekd.distillation.losses import target_view, view_loss
from scalekd.shapes import FeatureShape

FeatureLoss = Callable[[Tensor, Tensor], Tensor]

_LOSSES = pytest.mark.parametrize("loss", [spatial_loss, frequency_loss])


def _tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_equal_directions_cost_nothing_and_opposite_ones_four_a_token() -> None:
    target = _tokens(3, 10, 8)
    assert spatial_loss(7 * target, target) == pytest.approx(0, abs=1e-5)
    assert spatial_loss(-0.1 * target, target) == pytest.approx(40, rel=1e-6)


def test_a_right_angle_costs_two_a_token() -> None:
    predicted = torch.tensor([[[3.0, 0.0], [0.0, 0.5]]])
    target = torch.tensor([[[0.0, 9.0], [2.0, 0.0]]])
    assert spatial_loss(predicted, target) == 4


def test_losses_sum_over_tokens_and_average_over_the_batch() -> None:
    predicted, target = _tokens(1, 6, 8), _tokens(1, 6, 8, seed=1)
    once = spatial_loss(predicted, target)
    twice = spatial_loss(predicted.repeat(1, 2, 1), target.repeat(1, 2, 1))
    batch = spatial_loss(predicted.repeat(5, 1, 1), target.repeat(5, 1, 1))
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(batch, once)


def test_frequency_loss_ignores_what_is_constant_over_the_grid() -> None:
    predicted, target = _tokens(2, 12, 8), _tokens(2, 12, 8, seed=1)
    moved = frequency_loss(predicted + 3 * _tokens(2, 1, 8, seed=2), target - _tokens(1, 1, 8))
    torch.testing.assert_close(moved, frequency_loss(predicted, target))


@pytest.mark.parametrize("grid", [(7, 7), (3, 5), (1, 4)])
def test_frequency_loss_is_the_published_filter_on_any_grid(grid: tuple[int, int]) -> None:
    predicted, target = (_tokens(2, grid[0] * grid[1], 6, seed=s).double() for s in (0, 1))
    filtered = []
    for tokens in (predicted, target):
        spectrum = torch.fft.fft2(tokens.unflatten(1, grid), dim=(1, 2))
        spectrum[:, 0, 0] = 0
        filtered.append(torch.fft.ifft2(spectrum, dim=(1, 2)).real.flatten(1, 2))
    expected = spatial_loss(*filtered)
    torch.testing.assert_close(frequency_loss(predicted, target), expected)


def test_a_token_of_zeros_costs_one_and_has_no_gradient() -> None:
    predicted, target = _tokens(1, 3, 4), _tokens(1, 3, 4, seed=1)
    predicted[0, 1] = 0
    predicted.requires_grad_()
    loss = spatial_loss(predicted, target)
    loss.backward()

    rest = spatial_loss(predicted[:, [0, 2]], target[:, [0, 2]])
    torch.testing.assert_close(loss, rest + 1)
    assert predicted.grad is not None
    assert (predicted.grad[0, 1] == 0).all()
    assert (predicted.grad[0, [0, 2]] != 0).all()


@_LOSSES
def test_nothing_but_zeros_is_finite(loss: FeatureLoss) -> None:
    predicted = torch.zeros(2, 6, 4, requires_grad=True)
    value = loss(predicted, torch.zeros(2, 6, 4))
    value.backward()
    assert value == 0
    assert predicted.grad is not None
    assert (predicted.grad == 0).all()


@pytest.mark.parametrize("level", [0.1, 1e4])  # neither is a sum of few powers of two
def test_constant_maps_have_no_frequency_view(level: float) -> None:
    predicted = torch.full((2, 49, 8), level) * torch.arange(1, 9)
    predicted.requires_grad_()
    value = frequency_loss(predicted, torch.full((2, 49, 8), 0.3))
    value.backward()
    assert value == 0
    assert predicted.grad is not None
    assert (predicted.grad == 0).all()

    # Against a target that varies, each token costs the target's unit length.
    against_noise = frequency_loss(predicted.detach(), _tokens(2, 49, 8))
    assert against_noise == pytest.approx(49)


def test_a_large_mean_costs_the_frequency_loss_no_precision() -> None:
    # Steps of 2**-8 beside a mean of 1000 are exact in float32.
    detail = (_tokens(1, 16, 8) * 256).round() / 256
    target = _tokens(1, 16, 8, seed=1)
    exact = frequency_loss(detail.double(), target.double())
    assert frequency_loss(detail + 1000, target) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@_LOSSES
def test_half_precision_is_computed_in_single(loss: FeatureLoss, dtype: torch.dtype) -> None:
    predicted = (1000 * _tokens(2, 9, 16)).to(dtype)  # its squares overflow float16
    target = (1e-3 * _tokens(2, 9, 16, seed=1)).to(dtype)  # and these underflow it
    value = loss(predicted, target)
    assert value.dtype == torch.float32
    assert value == loss(predicted.float(), target.float())
    assert 0 < float(value) < 4 * 9


@_LOSSES
def test_double_precision_stays_double(loss: FeatureLoss) -> None:
    predicted = _tokens(1, 4, 3).double()
    assert loss(predicted, _tokens(1, 4, 3, seed=1)).dtype == torch.float64


@_LOSSES
def test_gradients_are_those_of_the_value(loss: FeatureLoss) -> None:
    predicted = _tokens(2, 6, 5, dtype=torch.float64).requires_grad_()
    target = _tokens(2, 6, 5, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(p, target.detach()), predicted)
    loss(predicted, target).backward()
    assert target.grad is None


@_LOSSES
def test_another_shape_is_refused_naming_both(loss: FeatureLoss) -> None:
    with pytest.raises(ValueError, match=r"\(2, 49, 8\).*\(2, 50, 8\)"):
        loss(torch.zeros(2, 49, 8), torch.zeros(2, 50, 8))


def test_unrelated_directions_cost_about_two_a_token() -> None:
    value = spatial_loss(_tokens(4, 49, 512), _tokens(4, 49, 512, seed=1))
    assert math.isclose(float(value), 2 * 49, rel_tol=0.02)


@pytest.mark.parametrize("view", ["spatial", "frequency"])
def test_one_view_of_the_target_serves_every_loss(view: Any) -> None:
    loss = {"spatial": spatial_loss, "frequency": frequency_loss}[view]
    target = torch.randn(2, 9, 4, requires_grad=True)
    compared = target_view(target, view)
    assert not compared.requires_grad
    for _ in range(2):
        predicted = torch.randn(2, 9, 4, requires_grad=True)
        (direct,) = torch.autograd.grad(loss(predicted, target), predicted)
        (shared,) = torch.autograd.grad(view_loss(predicted, compared, view), predicted)
        assert torch.equal(direct, shared)
    with pytest.raises(ValueError, match="token by token"):
        view_loss(torch.randn(2, 9, 5), compared, view)


def test_an_objective_makes_each_view_of_the_target_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(target: torch.Tensor, view: Any) -> torch.Tensor:
        made.append(view)
        return target_view(target, view)

    monkeypatch.setattr(feature_terms, "target_view", counted)
    shape = FeatureShape((3, 3), 8)
    objective = ScaleKDObjective(
        ScaleKDConfig(tpp=False, kd=False),
        student_levels=[(4, (6, 6)), (4, (3, 3))],
        teacher_stages={4: shape},
    )
    levels = [torch.randn(2, 4, 6, 6), torch.randn(2, 4, 3, 3)]
    targets = Targets(features=torch.randn(2, 9, 8))
    losses = objective(levels, torch.randn(2, 5), torch.zeros(2, dtype=torch.long), targets)
    assert sum("spatial" in n or "frequency" in n for n in losses) == 4
    assert sorted(made) == ["frequency", "spatial"]
