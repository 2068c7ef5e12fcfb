"""A timm model that gives its logits and the two feature maps ScaleKD reads, in one forward."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalekd.errors import UsageError
from scalekd.models.arguments import check_model_kwargs, constructor_arguments
from scalekd.models.build import build_model, preprocessing_of
from scalekd.models.levels import Levels, find_levels
from scalekd.models.names import describe_model
from scalekd.options import height_and_width
from scalekd.students.names import resolve_student_name
from scalekd.students.spec import StudentSpec


class StudentOutput(NamedTuple):
    """The outputs of a student for a batch.

    Attributes:
        logits: ``(batch, class)``, equal to the bare model's output.
        levels: The penultimate and the final feature map, each ``(batch, channel, row, column)``.
    """

    logits: Tensor
    levels: tuple[Tensor, Tensor]


class PooledOutput(NamedTuple):
    """`StudentOutput`, and the features before the classifier, ``(batch, feature)``."""

    logits: Tensor
    levels: tuple[Tensor, Tensor]
    pooled: Tensor


class Student(nn.Module):
    """A trainable timm model that also returns its last two levels; see :func:`create_student`.

    Attributes:
        model: The bare timm model; its state dict is what is exported.
        spec: Description of the student, for files and checks.
    """

    def __init__(self, model: nn.Module, spec: StudentSpec, levels: Levels) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self._levels = levels

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], *, pooled: bool = False
    ) -> StudentOutput | PooledOutput:
        """Compute logits and levels of normalised images in one forward pass of the model.

        Args:
            images: Normalised images.
            pooled: Return a `PooledOutput`.
        """
        model: Any = self.model
        final, (third, fourth) = model.forward_intermediates(
            images, indices=list(self._levels.indices)
        )
        logits = model.forward_head(final)
        levels = (third, self._levels.final_map(final, fourth))
        if not pooled:
            return StudentOutput(logits, levels)
        # A model without classifier returns its features.
        features = model.forward_head(final, pre_logits=True) if self.spec.num_classes else logits
        return PooledOutput(logits, levels, features.flatten(1))

    def num_features(self) -> int:
        """Return the width of the features before the classifier.

        Raises:
            UsageError: timm does not give access to these features of the model.
        """
        model: Any = self.model
        was_training, device = model.training, next(model.parameters()).device
        try:
            with torch.no_grad():
                output = self.eval()(
                    torch.zeros(1, 3, *self.spec.img_size, device=device), pooled=True
                )
        except TypeError as error:
            raise UsageError(
                f"{self.spec.model}: timm gives no access to its features before the classifier,"
                " which the summary loss compares; give --distillation summary_weight=0"
            ) from error
        finally:
            self.train(was_training)
        return int(output.pooled.shape[1])


def create_student(
    model: str,
    *,
    num_classes: int,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    new_head: bool | None = None,
    notes: list[str] | None = None,
) -> Student:
    """Create a student on the CPU, in training mode.

    Random weights come from torch's generator, so that a run's seed decides them.

    Args:
        model: Any name that :func:`~scalekd.students.resolve_student_name` takes.
        num_classes: Number of logits; 0 for a student without a classifier, which returns its
            pooled features. If it differs from that of the weights, the classifier gets
            random weights.
        img_size: Input size in pixels; by default the model's own size.
        pretrained: Whether to start from the published weights.
        checkpoint: Path of weights to start from.
        model_kwargs: Arguments of the timm model's constructor.
        mean: Mean per RGB channel, in 0..1; by default the one timm records for the model.
        std: Standard deviation per RGB channel, in 0..1; by default the one timm records.
        crop_pct: Share of the shorter side that the evaluation crop keeps; by default timm's.
        interpolation: Resize filter of the evaluation, one of `scalekd.views.Interpolation`; by
            default timm's.
        new_head: Whether the classifier keeps random weights instead of the loaded ones; by default
            only if the weights have another number of classes.
        notes: List that receives a sentence if the classifier keeps random weights.

    Raises:
        UsageError: The model is unknown, does not accept an argument or the image size, does not
            fit the weights, or has features that distillation cannot use.
        DataError: A checkpoint or model folder cannot be read.
        EnvironmentFault: Published weights are neither cached nor reachable.
    """
    if num_classes < 0:
        raise UsageError(f"a student cannot have num_classes={num_classes}")
    try:
        check_model_kwargs(model_kwargs or {})
    except ValueError as error:
        raise UsageError(f"student {model}: {error}") from error
    name, _ = resolve_student_name(model)
    source = describe_model(name)
    size = None if img_size is None else height_and_width(img_size)
    kwargs = {**source.model_args, **(model_kwargs or {}), "num_classes": num_classes}
    if size is not None and (source.pretrained_cfg.get("fixed_input_size") or "img_size" in kwargs):
        kwargs["img_size"] = size
    built = build_model(
        source,
        pretrained=pretrained,
        checkpoint=checkpoint,
        model_kwargs=kwargs,
        new_head=new_head,
        notes=notes,
    )
    if size is None:
        own_size = source.pretrained_cfg.get("input_size") or (3, 224, 224)
        height, width = height_and_width(kwargs.get("img_size") or own_size[1:])
        size = int(height), int(width)
    levels = find_levels(built.eval(), source.label, size)
    own = preprocessing_of(built)
    known = set(constructor_arguments(type(built))) - {"num_classes"}
    spec = StudentSpec(
        model=source.label,
        architecture=source.architecture,
        img_size=size,
        mean=mean or own.mean,
        std=std or own.std,
        interpolation=interpolation or own.interpolation,
        crop_pct=crop_pct or own.crop_pct,
        levels=levels.shapes,
        num_classes=num_classes,
        model_kwargs={k: v for k, v in kwargs.items() if k in known and v is not None},
    )
    return Student(built.train(), spec, levels)
