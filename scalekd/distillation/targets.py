"""Records of the teacher's outputs for a batch, as the objectives read them.

The reader of a cache, a live teacher and a user's own loop all fill the same records, so that an
objective does not depend on the source of its targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        """Return the softmax of scores / ``temperature``, in float32 or better, detached."""
        scores = at_least_float32(self.logits.detach())
        return (scores / temperature).softmax(dim=-1)


@dataclass(frozen=True)
class TopKLogits:
    """The teacher's likeliest classes, and the total probability of the others.

    The kept classes are exact. Of the others only their sum is known, so each gets the same
    share; with every class kept, the probabilities equal those of `FullLogits`.

    Attributes:
        indices: Kept classes, each at most once per row.
        log_probs: Natural logarithm of the kept classes' probabilities at temperature 1.
        log_sum_exp: Log-sum-exp of the teacher's scores: ``log_probs + log_sum_exp`` are scores.
        tail_mass: Probability, at temperature 1, of all other classes together.
        num_classes: Number of kept and other classes.
    """

    indices: Int64[Tensor, "batch k"]
    log_probs: Float[Tensor, "batch k"]
    log_sum_exp: Float[Tensor, " batch"]
    tail_mass: Float[Tensor, " batch"]
    num_classes: int

    def __post_init__(self) -> None:
        if self.indices.shape != self.log_probs.shape or self.num_kept > self.num_classes:
            raise ValueError(
                f"invalid top-k logits: {tuple(self.indices.shape)} indices, "
                f"{tuple(self.log_probs.shape)} log-probabilities, {self.num_classes} classes"
            )

    @property
    def num_kept(self) -> int:
        return self.indices.shape[-1]

    def probabilities(self, temperature: float = 1.0) -> Float[Tensor, "batch cls"]:
        """Return the probabilities of all classes, in float32 or better, detached.

        A temperature raises every class's probability to ``1 / temperature`` and normalises
        again, including the equal shares of the other classes: their part of the mass grows with
        the temperature as it would from full scores.
        """
        log_probs = at_least_float32(self.log_probs.detach())
        tail_mass = self.tail_mass.detach().to(log_probs.dtype).clamp_min(0)
        num_others = max(self.num_classes - self.num_kept, 1)
        log_share = (tail_mass / num_others).log()  # -inf if all classes are kept
        dense = log_share[:, None].repeat(1, self.num_classes).scatter(1, self.indices, log_probs)
        return (dense / temperature).softmax(dim=-1)


@dataclass(frozen=True)
class SelectedClasses:
    """The likeliest classes of `TopKLogits`, restricted to some of the teacher's classes.

    Selected classes that are kept have exact scores; the others get equal shares, as in
    `TopKLogits`. If none of the kept classes is selected, all selected ones are equally likely.

    Attributes:
        source: Logits over all of the teacher's classes.
        classes: Index of each selected class among the teacher's classes.
    """

    source: TopKLogits
    classes: Int64[Tensor, " cls"]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def probabilities(self, temperature: float = 1.0) -> Float[Tensor, "batch cls"]:
        """Return `TopKLogits.probabilities` of the selected classes, normalised again."""
        selected = self.source.probabilities(temperature)[:, self.classes]
        total = selected.sum(dim=-1, keepdim=True)
        even = torch.full_like(selected, 1 / self.num_classes)
        return torch.where(total > 0, selected / total, even)


def select_classes(
    logits: FullLogits | TopKLogits, classes: Int64[Tensor, " cls"]
) -> "FullLogits | SelectedClasses":
    """Restrict a teacher's logits to some of its classes, in a given order.

    For full logits the result is the scores of those classes; their softmax is the teacher's
    distribution conditioned on these classes.

    Args:
        logits: Logits over all of the teacher's classes.
        classes: Index of each class of the result among the teacher's classes, on the device of
            the logits.
    """
    if isinstance(logits, FullLogits):
        return FullLogits(logits.logits[:, classes])
    return SelectedClasses(logits, classes)


@dataclass(frozen=True)
class MeanLogits:
    """The mean of the softened probabilities of several teachers for the same views.

    As in You et al., *Learning from Multiple Teacher Networks* (KDD 2017), section 3.1. All
    teachers have the same weight.

    Attributes:
        teachers: Logits of each teacher; at least one, all over the same classes.
    """

    teachers: tuple[FullLogits | TopKLogits | SelectedClasses, ...]

    def __post_init__(self) -> None:
        classes = [teacher.num_classes for teacher in self.teachers]
        if len(set(classes)) != 1:
            raise ValueError(
                f"teachers of {classes} classes cannot be averaged; all need the same classes"
            )

    @property
    def num_classes(self) -> int:
        return self.teachers[0].num_classes

    def probabilities(self, temperature: float = 1.0) -> Float[Tensor, "batch cls"]:
        """Return the mean over teachers of :meth:`FullLogits.probabilities`."""
        probabilities = [teacher.probabilities(temperature) for teacher in self.teachers]
        return torch.stack(probabilities).mean(dim=0)


LogitTargets = FullLogits | TopKLogits | SelectedClasses | MeanLogits


@dataclass(frozen=True)
class Targets:
    """The teacher's outputs for a batch; parts that an objective does not use may be missing.

    Attributes:
        features: Patch tokens of the teacher's final stage after its last norm, row by row,
            without prefix tokens.
        logits: The teacher's scores for the same views.
        class_token: The class token of the final stage after its last norm, if the teacher has one.
        others: Features and class token of further teachers, by name.
        elsewhere: Summaries of other views, such as those of the batches of other processes. They
            are what `contrast_loss` tells this batch's views apart from, beside one another.
    """

    features: Float[Tensor, "batch token channel"] | None = None
    logits: LogitTargets | None = None
    class_token: Float[Tensor, "batch channel"] | None = None
    others: Mapping[str, "Targets"] = field(default_factory=dict)
    elsewhere: Float[Tensor, "view channel"] | None = None

    @property
    def summary(self) -> Float[Tensor, "batch channel"] | None:
        """The class token, or the mean of the patch tokens of a teacher that has none."""
        if self.class_token is not None or self.features is None:
            return self.class_token
        return self.features.mean(dim=1)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
