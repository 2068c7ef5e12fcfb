"""The logit and task losses, against hand-worked numbers and plain loops."""

import math

import pytest
import torch
from torch import Tensor

from scalekd.distillation import (
    FullLogits,
    TopKLogits,
    bce_loss,
    cross_entropy_loss,
    kd_loss,
    topk_kd_loss,
)


def _logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _top(logits: Tensor, k: int) -> TopKLogits:
    log_probs, indices = logits.log_softmax(dim=1).topk(k, dim=1)
    return TopKLogits(
        indices=indices,
        log_probs=log_probs,
        log_sum_exp=logits.logsumexp(dim=1),
        tail_mass=1 - log_probs.exp().sum(dim=1),
        num_classes=logits.shape[1],
    )


def test_kd_loss_of_an_undecided_student_is_log_classes_at_any_temperature() -> None:
    for temperature in (0.5, 1.0, 4.0):
        value = kd_loss(torch.zeros(3, 10), _logits(3, 10), temperature=temperature)
        assert value == pytest.approx(temperature**2 * math.log(10))


def test_kd_loss_of_two_classes_by_hand() -> None:
    # Teacher (3/4, 1/4), student (1/4, 3/4): 3/4 ln 4 + 1/4 ln 4/3.
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(3)]])
    expected = 0.75 * math.log(4) + 0.25 * math.log(4 / 3)
    assert kd_loss(student, teacher) == pytest.approx(expected)


def test_extreme_scores_stay_finite_and_right() -> None:
    student = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    value = kd_loss(student, torch.tensor([[1e4, 0.0, -1e4]]))
    value.backward()
    assert value == 2e4
    assert student.grad is not None
    assert student.grad.tolist() == [[-1, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_computed_in_single(dtype: torch.dtype) -> None:
    student, teacher = _logits(4, 10).to(dtype), _logits(4, 10, seed=1).to(dtype)
    labels = torch.arange(4)
    assert kd_loss(student, teacher) == kd_loss(student.float(), teacher.float())
    assert cross_entropy_loss(student, labels).dtype == torch.float32
    assert bce_loss(student, labels).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_with_every_class_kept_top_k_is_the_full_loss(temperature: float) -> None:
    student, teacher = _logits(5, 12), _logits(5, 12, seed=1)
    full = kd_loss(student, teacher, temperature=temperature)
    top = topk_kd_loss(student, _top(teacher, 12), temperature=temperature)
    torch.testing.assert_close(top, full)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("k", [1, 3, 11])
def test_top_k_spreads_the_rest_evenly_before_the_temperature(k: int, temperature: float) -> None:
    student, teacher = _logits(4, 12), _logits(4, 12, seed=1)
    kept = _top(teacher, k)

    total = 0.0
    for row in range(4):
        share = float(kept.tail_mass[row]) / (12 - k)
        known = dict(zip(kept.indices[row].tolist(), kept.log_probs[row].tolist(), strict=True))
        soft = [
            math.exp(known[c] / temperature) if c in known else share ** (1 / temperature)
            for c in range(12)
        ]
        scores = [float(s) / temperature for s in student[row]]
        norm = math.log(sum(math.exp(s) for s in scores))
        total -= sum(p / sum(soft) * (s - norm) for p, s in zip(soft, scores, strict=True))
    expected = temperature**2 * total / 4

    found = topk_kd_loss(student, kept, temperature=temperature)
    assert found == pytest.approx(expected, rel=1e-9)


def test_kept_classes_keep_their_probability() -> None:
    teacher = _logits(3, 20)
    probabilities = _top(teacher, 5).probabilities()
    exact = teacher.softmax(dim=1)
    kept = exact.topk(5, dim=1).indices
    torch.testing.assert_close(probabilities.gather(1, kept), exact.gather(1, kept))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("tail_mass", [0.0, -1e-7])  # rounding may leave less than nothing
def test_an_empty_tail_is_finite(tail_mass: float) -> None:
    kept = TopKLogits(
        indices=torch.tensor([[2, 0]]),
        log_probs=torch.tensor([[math.log(0.5), math.log(0.5)]]),
        log_sum_exp=torch.zeros(1),
        tail_mass=torch.tensor([tail_mass]),
        num_classes=4,
    )
    student = torch.zeros(1, 4, requires_grad=True)
    value = topk_kd_loss(student, kept, temperature=2.0)
    value.backward()
    assert value.item() == pytest.approx(4 * math.log(4))
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_a_cache_in_half_precision_is_softened_in_single() -> None:
    kept = _top(_logits(2, 8), 3)
    half = TopKLogits(
        kept.indices, kept.log_probs.half(), kept.log_sum_exp.float(), kept.tail_mass.float(), 8
    )
    assert half.probabilities(2.0).dtype == torch.float32


def test_gradients_are_those_of_the_value_and_reach_no_teacher() -> None:
    student = _logits(3, 6).requires_grad_()
    teacher = _logits(3, 6, seed=1).requires_grad_()
    labels = torch.tensor([0, 5, 2])
    kept = _top(teacher.detach(), 2)
    for loss in (
        lambda s: kd_loss(s, teacher.detach(), temperature=2.0),
        lambda s: topk_kd_loss(s, kept, temperature=2.0),
        lambda s: bce_loss(s, labels, label_smoothing=0.1),
    ):
        assert torch.autograd.gradcheck(loss, student)
    kd_loss(student, teacher).backward()
    assert teacher.grad is None


def test_task_losses_by_hand() -> None:
    labels = torch.tensor([0, 1])
    certain = torch.tensor([[50.0, 0, 0, 0], [0, 50.0, 0, 0]])
    assert cross_entropy_loss(torch.zeros(2, 4), labels) == pytest.approx(math.log(4))
    assert cross_entropy_loss(certain, labels) == pytest.approx(0)
    # A tenth of the target is spread over four classes, three of which are 50 nats away.
    assert cross_entropy_loss(certain, labels, label_smoothing=0.1) == pytest.approx(3.75)
    assert bce_loss(torch.zeros(2, 1000), labels) == pytest.approx(1000 * math.log(2), rel=1e-6)
    # Three classes with targets of 0.025 at score 0, and one 50 nats above its target of 0.925.
    smoothed = bce_loss(certain, labels, label_smoothing=0.1)
    assert smoothed == pytest.approx(3 * math.log(2) + 0.075 * 50)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        kd_loss(torch.zeros(1, 3), torch.zeros(1, 3), temperature=0)
    with pytest.raises(ValueError, match="student scores 3 classes and the teacher 4"):
        kd_loss(torch.zeros(1, 3), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="invalid top-k logits"):
        TopKLogits(
            torch.zeros(1, 5, dtype=torch.int64),
            torch.zeros(1, 5),
            torch.zeros(1),
            torch.zeros(1),
            num_classes=4,
        )


def test_the_likeliest_class_decides_a_cold_teacher() -> None:
    probabilities = FullLogits(torch.tensor([[1.0, 2.0, 0.0]])).probabilities(0.01)
    assert probabilities[0].tolist() == pytest.approx([0, 1, 0], abs=1e-6)
