"""The losses that the objectives add up.

Every loss here accepts half precision, computes in float32 or better, averages over the batch only,
and has no weight: the objective applies weights. No gradient flows to the teacher.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from scalekd.distillation.config import View
from scalekd.distillation.targets import FullLogits, LogitTargets, at_least_float32

_MIN_NORM = 1e-12  # as in the published method; a shorter token has no direction
_MIN_COUNT = 1e-6  # where no image has a label, the sum is an exact zero

UNLABELLED = -1
"""Label of an image without a label."""


def spatial_loss(
    predicted: Float[Tensor, "batch token channel"],
    target: Float[Tensor, "batch token channel"],
) -> Float[Tensor, ""]:
    """Squared distance of the unit-normalised tokens, summed over tokens (DFM's spatial view).

    Equals the sum over tokens of ``2 - 2 cos``: 0 for equal directions, about ``2 * tokens``
    for unrelated ones, ``4 * tokens`` at most. A token of zeros has no direction: its unit
    vector is zero, it costs 1, and its own gradient is zero. (The published code divides by
    1e-12 there, which sends gradients of 1e10 and more through the student.)

    Args:
        predicted: Tokens of the student, in the teacher's width, on the teacher's grid.
        target: Tokens of the teacher; no gradient flows.

    Returns:
        Sum over tokens, mean over the batch.

    Raises:
        ValueError: The shapes differ.
    """
    return view_loss(predicted, target_view(target, "spatial"), "spatial")


def frequency_loss(
    predicted: Float[Tensor, "batch token channel"],
    target: Float[Tensor, "batch token channel"],
) -> Float[Tensor, ""]:
    """Compute `spatial_loss` without each channel's mean over the grid (DFM's frequency view).

    The published method takes a 2-D DCT of each channel, zeroes the constant coefficient and
    transforms back. That is exactly the subtraction of the mean, so neither a transform nor a
    square grid is needed. A spatially constant map gives exact zeros. Its loss against another
    constant map is therefore zero and has no gradient, whereas the rounding noise of a transform
    would be scaled to unit length.

    Arguments, result and errors are those of `spatial_loss`.
    """
    return view_loss(predicted, target_view(target, "frequency"), "frequency")


def target_view(
    target: Float[Tensor, "batch token channel"], view: View
) -> Float[Tensor, "batch token channel"]:
    """Return unit vectors of the teacher's tokens in a view, shared by all losses of a step.

    Args:
        target: Tokens of the teacher; no gradient flows.
        view: ``"spatial"`` takes the tokens as they are, ``"frequency"`` without the mean over
            the grid.
    """
    return _unit(_of_view(at_least_float32(target.detach()), view))


def view_loss(
    predicted: Float[Tensor, "batch token channel"],
    target: Float[Tensor, "batch token channel"],
    view: View,
) -> Float[Tensor, ""]:
    """Squared distance of unit tokens in a view; see `spatial_loss` and `frequency_loss`.

    Args:
        predicted: Tokens of the student, in the teacher's width, on the teacher's grid.
        target: Result of `target_view` for the same view.
        view: ``"spatial"`` or ``"frequency"``.

    Raises:
        ValueError: The shapes differ.
    """
    _check_same_shape(predicted, target)
    difference = _unit(_of_view(at_least_float32(predicted), view)) - target
    return difference.square().sum(dim=(1, 2)).mean()


def kd_loss(
    student_logits: Float[Tensor, "batch cls"],
    teacher_logits: Float[Tensor, "batch cls"] | LogitTargets,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross entropy from the softened teacher to the softened student, averaged over the batch.

    Scaled by ``temperature**2`` so that its gradient keeps its size as the temperature
    changes (Hinton et al. 2015, section 2).

    Args:
        student_logits: Scores of all classes before softmax.
        teacher_logits: Scores before softmax, or a record of them from a cache, such as
            `TopKLogits`; no gradient flows.
        temperature: Divides both sets of scores; above 1 the minor classes count for more.

    Returns:
        Loss in nats.

    Raises:
        ValueError: ``temperature`` is not positive, or the numbers of classes differ.
    """
    if isinstance(teacher_logits, Tensor):
        teacher_logits = FullLogits(teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if student_logits.shape[-1] != teacher_logits.num_classes:
        raise ValueError(
            f"the student scores {student_logits.shape[-1]} classes and the teacher "
            f"{teacher_logits.num_classes}: logits can only be distilled over the same classes; "
            "give the student the teacher's number of classes, or turn the kd loss off"
        )
    # log_softmax and not log(softmax): scores 100 apart stay finite in float32.
    log_student = (at_least_float32(student_logits) / temperature).log_softmax(dim=-1)
    teacher = teacher_logits.probabilities(temperature)
    return -(teacher * log_student).sum(dim=-1).mean() * temperature**2


topk_kd_loss = kd_loss
"""Name of `kd_loss` for `TopKLogits` in version 0.2."""


def summary_loss(
    predicted: Float[Tensor, "batch channel"],
    target: Float[Tensor, "batch channel"],
) -> Float[Tensor, ""]:
    """Squared distance of the unit-normalised summaries of images, ``2 - 2 cos``.

    Args:
        predicted: The student's pooled features, in the teacher's width.
        target: The teacher's class token, or the mean of its patch tokens; no gradient flows.

    Returns:
        Mean over the batch: 0 for equal directions, about 2 for unrelated ones.

    Raises:
        ValueError: The shapes differ.
    """
    return spatial_loss(predicted[:, None], target[:, None])


def contrast_loss(
    predicted: Float[Tensor, "batch channel"],
    target: Float[Tensor, "view channel"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross entropy of finding each image's target among all targets, by their cosines.

    Only what differs between images lowers it, and as much as it tells them apart (InfoNCE, van den
    Oord et al. 2018; between student and teacher: Tian et al., *Contrastive Representation
    Distillation*, ICLR 2020).

    Args:
        predicted: The student's pooled features, in the teacher's width.
        target: The teacher's standardised summaries: first those of the same images in the same
            order, then those of any other images. No gradient flows.
        temperature: Divides the cosines.

    Returns:
        Mean over the batch in nats: about log(number of targets) if the two are unrelated, and 0
        for a single target.

    Raises:
        ValueError: The widths differ, or there are fewer targets than images.
    """
    _check_same_shape(predicted[:, None], target[: len(predicted), None])
    units = _unit(at_least_float32(predicted)), _unit(at_least_float32(target.detach()))
    own = torch.arange(len(predicted), device=predicted.device)
    with torch.autocast(predicted.device.type, enabled=False):  # a cosine of 0.996 is not 1
        cosines = units[0] @ units[1].T
    return F.cross_entropy(cosines / temperature, own)


def cross_entropy_loss(
    logits: Float[Tensor, "batch cls"],
    labels: Int64[Tensor, " batch"],
    *,
    label_smoothing: float = 0.0,
    num_labelled: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Cross entropy with the labels, averaged over the labelled images of the batch.

    Args:
        logits: Scores before softmax.
        labels: Classes; -1 for an image without a label, which is left out.
        label_smoothing: Part of the target spread evenly over all classes, the label's included.
        num_labelled: Divisor of the sum; by default the number of labelled images. See
            `Objective.forward`.

    Returns:
        Loss in nats; 0 if no image has a label.
    """
    total = F.cross_entropy(
        at_least_float32(logits),
        labels,
        label_smoothing=label_smoothing,
        ignore_index=UNLABELLED,
        reduction="sum",
    )
    return total / _count(labels, num_labelled)


def bce_loss(
    logits: Float[Tensor, "batch cls"],
    labels: Int64[Tensor, " batch"],
    *,
    label_smoothing: float = 0.0,
    num_labelled: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Compute the sigmoid cross entropy of every class with the one-hot label.

    Summed over classes and averaged over the labelled images: ``classes * ln 2`` at zero scores.

    Args:
        logits: Scores before sigmoid.
        labels: Classes; -1 for an image without a label, which is left out.
        label_smoothing: Part of the target spread evenly over all classes, the label's included.
        num_labelled: Divisor of the sum; by default the number of labelled images. See
            `Objective.forward`.

    Returns:
        Loss in nats; 0 if no image has a label.
    """
    scores = at_least_float32(logits)
    num_classes = scores.shape[-1]
    target = torch.full_like(scores, label_smoothing / num_classes)
    on = 1 - label_smoothing + label_smoothing / num_classes
    target.scatter_(1, labels.clamp(min=0)[:, None], on)
    per_image = F.binary_cross_entropy_with_logits(scores, target, reduction="none").sum(dim=1)
    labelled = labels != UNLABELLED
    return torch.where(labelled, per_image, 0.0).sum() / _count(labels, num_labelled)


def _count(labels: Tensor, num_labelled: Tensor | None) -> Tensor:
    count = (labels != UNLABELLED).sum() if num_labelled is None else num_labelled
    return count.clamp(min=_MIN_COUNT)


TASK_LOSSES = {"cross_entropy": cross_entropy_loss, "bce": bce_loss}
"""The task losses by name; all take ``(logits, labels, *, label_smoothing, num_labelled)``."""


def _unit(tokens: Float[Tensor, "*any channel"]) -> Float[Tensor, "*any channel"]:
    squared = tokens.square().sum(dim=-1, keepdim=True)
    has_direction = squared > _MIN_NORM**2
    # The inner `where` keeps the infinite slope of the root at zero out of the backward pass.
    return tokens * (torch.where(has_direction, squared, 1.0).rsqrt() * has_direction)


def _of_view(tokens: Tensor, view: View) -> Tensor:
    return _without_mean(tokens) if view == "frequency" else tokens


def _without_mean(
    tokens: Float[Tensor, "batch token channel"],
) -> Float[Tensor, "batch token channel"]:
    # Any shift cancels, also in the gradient. This one makes a constant map exactly zero and
    # loses no precision for a map of large mean.
    shifted = tokens - tokens[:, :1].detach()
    return shifted - shifted.mean(dim=1, keepdim=True)


def _check_same_shape(predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape or predicted.ndim != 3:
        raise ValueError(
            f"features are compared token by token, and {tuple(predicted.shape) = } differs from "
            f"{tuple(target.shape) = }; both must be (batch, patch tokens, channels) of the "
            "teacher's final stage"
        )
