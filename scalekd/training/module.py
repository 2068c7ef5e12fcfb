"""Student and objective as one module, so that data parallelism and compilation see one forward.

``DistributedDataParallel`` averages only the gradients of the module it wraps, and only in its
``forward``; a projector outside of it would train on one process only.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64, UInt8
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from scalekd.distillation import (
    FullLogits,
    LogitTargets,
    MeanLogits,
    Objective,
    SelectedClasses,
    Targets,
)
from scalekd.distillation.targets import at_least_float32
from scalekd.errors import UsageError
from scalekd.models.build import classifier_names
from scalekd.models.normalise import Normalise
from scalekd.students import Student

_LEAST_CONVOLUTIONS = 8
BACKBONE = "backbone"
"""Pattern of :func:`freeze_parameters` for all but the classifier."""

METRICS = ("top1", "teacher_agreement")
"""Names of `StepOutput.metrics`."""


class StepOutput(NamedTuple):
    """One batch's result.

    Attributes:
        losses: Weighted terms and their sum ``total``, from the objective.
        metrics: Percentages over the batch, without gradient: ``top1`` on the labelled training
            views (not a number if a batch has none) and, if the teacher's logits are available,
            ``teacher_agreement`` of the likeliest class. Empty if no classifier is trained.
    """

    losses: dict[str, Float[Tensor, ""]]
    metrics: dict[str, Float[Tensor, ""]]


class DistillationModule(nn.Module):
    """Normalises pixels for the student, runs it, and asks the objective for the losses.

    Args:
        student: Called with normalised pixels ``(batch, 3, row, column)``; returns an object with
            ``logits`` and ``levels``.
        objective: An objective of `scalekd.distillation`. Its parameters exclude its frozen tail.
        mean: Mean per channel of pixels scaled to 0..1.
        std: Standard deviation per channel of pixels scaled to 0..1.
        channels_last: Feed the student channels-last memory.
        labelled: Which views have a label. With ``"some"``, the processes of a run exchange the
            number of labelled views of each batch, so that the task loss is the mean over those
            of all processes; with ``"none"``, top-1 is not measured.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        channels_last: bool = False,
        labelled: Literal["all", "some", "none"] = "all",
    ) -> None:
        super().__init__()
        self._labelled = labelled
        self.student = student
        self.objective = objective
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            student.to(memory_format=torch.channels_last)
        self.normalise = Normalise(mean, std)

    def forward(
        self,
        pixels: UInt8[Tensor, "batch 3 row column"],
        labels: Int64[Tensor, " batch"],
        targets: Targets,
    ) -> StepOutput:
        images = self.normalise(pixels).contiguous(memory_format=self._memory_format)
        objective, extra = self.objective, {}
        output = (
            self.student(images, pooled=True) if objective.needs_pooled else self.student(images)
        )
        if objective.needs_pooled:
            extra["pooled"] = output.pooled
        if objective.contrasts_images and self.training:
            targets = _with_summaries_elsewhere(targets)
        if objective.needs_labels and self._labelled == "some":
            extra["num_labelled"] = _mean_over_processes((labels >= 0).sum().float())
        losses = objective(output.levels, output.logits, labels, targets, **extra)
        return StepOutput(losses, self._metrics(output.logits.detach(), labels, targets))

    @torch.no_grad()
    def _metrics(self, logits: Tensor, labels: Tensor, targets: Targets) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        if not self.objective.trains_classifier:
            return metrics
        answer = logits.argmax(dim=1)
        if self._labelled != "none":
            # Where no view of a batch has a label: 0 / 0, which means leave out.
            metrics["top1"] = 100 * (answer == labels).sum() / (labels >= 0).sum()
        if targets.logits is not None:
            agreement = answer == likeliest_class(targets.logits)
            metrics["teacher_agreement"] = 100 * agreement.float().mean()
        return metrics


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _with_summaries_elsewhere(targets: Targets) -> Targets:
    """Add the summaries of the other processes' batches, which are as large as this one.

    The loss of a view is then that of one process with the batches of all.
    """
    if not _has_processes():
        return targets
    elsewhere, summary = None, targets.summary
    if summary is not None:
        own = at_least_float32(summary).contiguous()  # not every backend has bfloat16
        rank, number = torch.distributed.get_rank(), torch.distributed.get_world_size()
        batches = [torch.empty_like(own) for _ in range(number)]
        torch.distributed.all_gather(batches, own)
        elsewhere = torch.cat([*batches[:rank], own[:0], *batches[rank + 1 :]])
    others = {name: _with_summaries_elsewhere(other) for name, other in targets.others.items()}
    return replace(targets, elsewhere=elsewhere, others=others)


def _mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a value over the processes of a run, without waiting for the device."""
    if not _has_processes():
        return value
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


def likeliest_class(logits: LogitTargets) -> Int64[Tensor, " batch"]:
    """Return the likeliest class of the teacher, or of several teachers averaged."""
    if isinstance(logits, FullLogits):
        return logits.logits.argmax(dim=1)
    if isinstance(logits, MeanLogits | SelectedClasses):
        return logits.probabilities().argmax(dim=1)
    best = logits.log_probs.argmax(dim=1, keepdim=True)
    return logits.indices.gather(1, best).squeeze(1)


@contextmanager
def norm_faults(num_views: int) -> Iterator[None]:
    """Explain in one line that batch normalisation has only one value per channel.

    Args:
        num_views: Number of views in the batch.

    Raises:
        UsageError: Batch normalisation has only one value per channel.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise UsageError(
            f"--batch-size {num_views}: batch normalisation of a map of 1 x 1 needs two views in a "
            "batch; give a larger --batch-size or --img-size"
        ) from error


def is_convolutional(model: nn.Module) -> bool:
    """Return whether a model is a CNN; a ViT or MLP with a patch embedding is none."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    attention = any("attention" in type(module).__name__.lower() for module in model.modules())
    return convolutions >= _LEAST_CONVOLUTIONS and not attention


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters that match a pattern.

    The statistics of batch norms among them are kept fixed by `hold_frozen_norms`.

    Args:
        model: Bare student.
        patterns: Parameter or module names, with ``*``: ``stem``, ``blocks.0``, ``layers.[01]``; or
            ``backbone``: all but the classifier.

    Raises:
        UsageError: A pattern matches nothing, or no classifier is left to train.
    """
    for pattern in patterns:
        if pattern == BACKBONE:
            _freeze_backbone(model)
            continue
        matched = False
        for name, parameter in model.named_parameters():
            parents = name.split(".")
            prefixes = (".".join(parents[:depth]) for depth in range(1, len(parents) + 1))
            if any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes):
                parameter.requires_grad_(False)
                matched = True
        if not matched:
            children = ", ".join(name for name, _ in model.named_children())
            raise UsageError(
                f"--freeze {pattern}: no parameter of the student has this name; "
                f"its parts are {children}"
            )


def _freeze_backbone(model: nn.Module) -> None:
    heads = classifier_names(model)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in heads:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("--freeze backbone: the student has no classifier that is left to train")


def freeze_unread(student: Student, *, pooled: bool) -> None:
    """Stop training the parameters that feature maps (and pooled features) do not depend on.

    These are the classifier and, without pooled features, norms and layers between the final map
    and the classifier. Data parallelism requires a gradient of every trained parameter.

    Args:
        student: Student whose logits are not trained.
        pooled: Whether its pooled features are trained.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trained:
        return
    was_training = student.training
    blank = torch.zeros(1, 3, *student.spec.img_size, device=trained[0].device)
    output = student.eval()(blank, pooled=pooled)
    student.train(was_training)
    read = [*output.levels, *([output.pooled] if pooled else [])]
    gradients = torch.autograd.grad(
        torch.stack([part.sum() for part in read]).sum(), trained, allow_unused=True
    )
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def synchronise_batch_norm(student: Student, accelerator: Accelerator) -> None:
    """Synchronise the student's batch norms over all processes; modifies the student.

    A student without batch norm is left as it is. Projectors are not touched, as in the reference.

    Raises:
        UsageError: Several processes train on CPUs, where torch does not offer it.
    """
    model = student.model
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise UsageError(
            f"--sync-bn: {accelerator.num_processes} processes train on CPUs, where torch cannot"
            " synchronise batch norm; train on GPUs, in one process, or with --no-sync-bn"
        )
    student.model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def hold_frozen_norms(model: nn.Module) -> None:
    """Put norms whose parameters are all frozen into eval mode. Call this after ``train()``."""
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and parameters
            and not any(parameter.requires_grad for parameter in parameters)
        ):
            module.eval()
