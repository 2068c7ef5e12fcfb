"""User-defined modules as teachers, for caches written from Python."""

import math
from collections.abc import Sequence

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from scalekd.errors import UsageError
from scalekd.models.weights import weights_sha256
from scalekd.options import height_and_width, image_size
from scalekd.shapes import FeatureShape
from scalekd.teachers.features_only import FEATURES_ONLY, OwnModule, returned
from scalekd.teachers.spec import TeacherSpec
from scalekd.teachers.teacher import Teacher

_MAX_DIFFERENCE = 0.02  # relative; twice the default error of the codec, far above rounding


def teacher_from_module(
    module: nn.Module,
    *,
    name: str,
    img_size: int | tuple[int, int],
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    class_names: Sequence[str] | None = None,
    licence: str | None = None,
) -> Teacher:
    """Make a teacher from any module, frozen and in eval mode.

    The module takes normalised images ``(batch, 3, row, column)``. It returns its final feature
    map ``(batch, channel, row, column)``, or a list of the map before it and the final one; or a
    pair of that and logits ``(batch, class)``. The output for an image must not depend on the
    other images of the batch.

    Args:
        module: The module, on the CPU; it is run on two images of noise.
        name: Name of the teacher in caches.
        img_size: Height and width of the views in pixels; one number for a square.
        mean: Mean per RGB channel, in 0..1, for the normalisation of the input.
        std: Standard deviation per RGB channel, in 0..1.
        class_names: Name of each class of the logits.
        licence: Licence of the weights.

    Raises:
        UsageError: The outputs have another form or depend on the other images of the batch,
            ``class_names`` has another number of classes, or an argument is impossible.
    """
    if not name.isprintable() or not name.strip():
        raise UsageError(f"name={name!r}: give printable text that names the teacher in caches")
    try:
        size = height_and_width(image_size(img_size))  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"{name}: img_size={img_size!r}: {error}") from error
    moments = (*mean, *std)
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, moments)) or min(std) <= 0:
        raise UsageError(
            f"{name}: mean={mean} and std={std}: expected three finite numbers each, std above 0"
        )
    module = module.eval().requires_grad_(False)
    maps, logits = _checked(module, name, size)
    shapes = [FeatureShape((m.shape[2], m.shape[3]), m.shape[1]) for m in maps]
    num_classes = None if logits is None else logits.shape[1]
    if class_names is not None and len(class_names) != (num_classes or 0):
        raise UsageError(
            f"{name}: {len(class_names)} class names for {num_classes or 0} classes of its logits"
        )
    spec = TeacherSpec(
        model=name,
        architecture=type(module).__name__,
        family=FEATURES_ONLY,
        weights_sha256=weights_sha256(module.state_dict()),
        weights_source="checkpoint",
        img_size=size,
        mean=mean,
        std=std,
        interpolation="bicubic",
        crop_pct=1.0,
        stages={3: shapes[0], 4: shapes[-1]},
        num_classes=num_classes,
        licence=licence,
        model_kwargs={},
        tail_blocks=1,
        class_names=None if class_names is None else tuple(class_names),
    )
    reason = "its module returns none" if num_classes is None else None
    return Teacher(module, spec, OwnModule(spec.stages), no_classifier=reason)


def _checked(
    module: nn.Module, name: str, size: tuple[int, int]
) -> tuple[list[Tensor], Tensor | None]:
    """Return a module's outputs for one image, compared with its row in a batch of two.

    Raises:
        UsageError: They differ by more than rounding, or are none that a teacher can return.
    """
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = returned(module, images[:1].clone())  # which the module may change in place
        together = returned(module, images)
    rows = [(maps if logits is None else [*maps, logits]) for maps, logits in (alone, together)]
    for one, both in zip(*rows, strict=True):
        if one.shape[1:] != both.shape[1:]:
            raise UsageError(
                f"{name}: the module returned {tuple(one.shape)} for one image and"
                f" {tuple(both.shape)} for two; the output for an image must not depend on others"
            )
        first, second = one[0].float(), both[0].float()
        difference = (first - second).norm() / torch.maximum(first.norm(), second.norm())
        if difference > _MAX_DIFFERENCE:
            raise UsageError(
                f"{name}: the module's output for an image differs by {difference:.0%} between the"
                " image alone and a batch of two, so it depends on the other images (batch norm"
                " with the statistics of the batch?) or on chance (dropout?); a teacher's must not"
            )
    return alone
