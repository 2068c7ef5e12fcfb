"""What the teacher says about a batch, as the objectives take it.

Plain records of tensors: the reader of a cache, a live teacher and one's own loop all fill the
same ones, so that an objective never knows where its targets came from.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class FullLogits:
    """The teacher's scores of every class, before softmax."""

    logits: Float[Tensor, "batch cls"]

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1]

    def probabilities(self, temperature: float = 1.0) -> Float[Tensor, "batch cls"]:
        """Softmax of the scores divided by ``temperature``, in float32 or better, detached."""
        scores = at_least_float32(self.logits.detach())
        return (scores / temperature).softmax(dim=-1)


@dataclass(frozen=True)
class TopKLogits:
    """The teacher's likeliest classes, and how much probability the others share.

    The kept classes are exact. Of the others only their sum is known, so each gets the same
    share; with every class kept, this is exactly what `FullLogits` says.

    Attributes:
        indices: Classes kept, each at most once in a row.
        log_probs: Natural log of their probabilities at temperature 1.
        log_sum_exp: Log-sum-exp of the teacher's scores: ``log_probs + log_sum_exp`` are scores.
        tail_mass: Probability, at temperature 1, of all other classes together.
        num_classes: Kept and other classes.
    """

    indices: Int64[Tensor, "batch k"]
    log_probs: Float[Tensor, "batch k"]
    log_sum_exp: Float[Tensor, " batch"]
    tail_mass: Float[Tensor, " batch"]
    num_classes: int

    def __post_init__(self) -> None:
        if self.indices.shape != self.log_probs.shape or self.num_kept > self.num_classes:
            raise ValueError(
                f"not top-k logits: {tuple(self.indices.shape)} indices, "
                f"{tuple(self.log_probs.shape)} log-probabilities, {self.num_classes} classes"
            )

    @property
    def num_kept(self) -> int:
        return self.indices.shape[-1]

    def probabilities(self, temperature: float = 1.0) -> Float[Tensor, "batch cls"]:
        """Probabilities of all classes at any temperature, in float32 or better, detached.

        A temperature raises every class's probability to ``1 / temperature`` and normalises
        again, the unseen classes' equal shares included: their part of the mass grows with the
        temperature as it would from full scores.
        """
        log_probs = at_least_float32(self.log_probs.detach())
        tail_mass = self.tail_mass.detach().to(log_probs.dtype).clamp_min(0)
        num_others = max(self.num_classes - self.num_kept, 1)
        log_share = (tail_mass / num_others).log()  # -inf where the kept classes are all there is
        dense = log_share[:, None].repeat(1, self.num_classes).scatter(1, self.indices, log_probs)
        return (dense / temperature).softmax(dim=-1)


@dataclass(frozen=True)
class SelectedClasses:
    """The likeliest classes of `TopKLogits`, over some of the teacher's classes only.

    Exact among the kept classes that are selected; the others get equal shares, as in
    `TopKLogits`. Where none of the kept classes is selected, all selected ones are equally likely.

    Attributes:
        source: Of all of the teacher's classes.
        classes: The teacher's class of each of these classes.
    """

    source: TopKLogits
    classes: Int64[Tensor, " cls"]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def probabilities(self, temperature: float = 1.0) -> Float[Tensor, "batch cls"]:
        """`TopKLogits.probabilities` of the selected classes, normalised again."""
        selected = self.source.probabilities(temperature)[:, self.classes]
        total = selected.sum(dim=-1, keepdim=True)
        even = torch.full_like(selected, 1 / self.num_classes)
        return torch.where(total > 0, selected / total, even)


def select_classes(
    logits: FullLogits | TopKLogits, classes: Int64[Tensor, " cls"]
) -> "FullLogits | SelectedClasses":
    """The teacher's answer over some of its classes, in a given order.

    Of full logits these are the scores of those classes, whose softmax is the teacher's
    distribution given that one of them is right.

    Args:
        logits: Of all of the teacher's classes.
        classes: The teacher's class of each class of the result, on the device of the logits.
    """
    if isinstance(logits, FullLogits):
        return FullLogits(logits.logits[:, classes])
    return SelectedClasses(logits, classes)


@dataclass(frozen=True)
class MeanLogits:
    """What several teachers say of the same views: the mean of their softened probabilities.

    As in You et al., *Learning from Multiple Teacher Networks* (KDD 2017), section 3.1. Teachers
    count alike.

    Attributes:
        teachers: At least one; all over the same classes.
    """

    teachers: tuple[FullLogits | TopKLogits | SelectedClasses, ...]

    def __post_init__(self) -> None:
        classes = [teacher.num_classes for teacher in self.teachers]
        if len(set(classes)) != 1:
            raise ValueError(f"teachers of {classes} classes have no mean; they need the same ones")

    @property
    def num_classes(self) -> int:
        return self.teachers[0].num_classes

    def probabilities(self, temperature: float = 1.0) -> Float[Tensor, "batch cls"]:
        """Mean over teachers of :meth:`FullLogits.probabilities`."""
        found = [teacher.probabilities(temperature) for teacher in self.teachers]
        return torch.stack(found).mean(dim=0)


LogitTargets = FullLogits | TopKLogits | SelectedClasses | MeanLogits


@dataclass(frozen=True)
class Targets:
    """What an objective learns from; a part that it does not use may be missing.

    Attributes:
        features: Patch tokens of the teacher's final stage after its last norm, row by row,
            without prefix tokens.
        logits: The teacher's scores of the same views.
    """

    features: Float[Tensor, "batch token channel"] | None = None
    logits: LogitTargets | None = None


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision values in float32; float32 and float64 unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
