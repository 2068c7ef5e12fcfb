"""The fifteen RandAugment operations, each with a resolved argument, on 8-bit RGB Pillow images.

Definitions, order and argument units are timm's (``timm.data.auto_augment``, the ``rand`` sets),
so that a policy means the same here and there. torchvision's v2 functionals apply them; it has no
solarize-add, and its ``affine`` moves about the centre by whole pixels and degrees, which is not
timm's shear and translation, so those three go to Pillow directly. On Pillow images torchvision
calls Pillow too: pixels come from Pillow's fixed-point code either way.

torchvision, and torch with it, is imported by the first operation applied, not before: policies,
draws and crop-and-flip views need neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image

Fill = tuple[int, int, int]
_Apply = Callable[[Image.Image, float, str, Fill], Image.Image]


@dataclass(frozen=True)
class OperationRange:
    """What a stored operation may say; anything else is a damaged record.

    Attributes:
        id: Number in the cache, for ever. 0 means no operation.
        low: Smallest argument.
        high: Largest argument.
        whole: The argument is an integer.
    """

    id: int
    low: float
    high: float
    whole: bool = False


# Ranges cover every argument that a policy of magnitude up to 30 can draw.
OPERATIONS: dict[str, OperationRange] = {
    "autocontrast": OperationRange(1, 0, 0),
    "equalize": OperationRange(2, 0, 0),
    "invert": OperationRange(3, 0, 0),
    "rotate": OperationRange(4, -180, 180),
    "posterize": OperationRange(5, 0, 8, whole=True),
    "solarize": OperationRange(6, 0, 256, whole=True),
    "solarize_add": OperationRange(7, 0, 255, whole=True),
    "color": OperationRange(8, 0, 8),
    "contrast": OperationRange(9, 0, 8),
    "brightness": OperationRange(10, 0, 8),
    "sharpness": OperationRange(11, 0, 8),
    "shear_x": OperationRange(12, -2, 2),
    "shear_y": OperationRange(13, -2, 2),
    "translate_x": OperationRange(14, -2, 2),
    "translate_y": OperationRange(15, -2, 2),
}

_SOLARIZE_ADD_BELOW = 128  # timm's threshold: brighter values stay as they are


def check_operation(name: str, argument: float) -> None:
    """Raise ValueError unless ``argument`` is one that operation ``name`` can have."""
    limits = OPERATIONS.get(name)
    if limits is None:
        raise ValueError(f"no operation {name!r}; there are {', '.join(OPERATIONS)}")
    if not limits.low <= argument <= limits.high or (limits.whole and argument % 1):
        kind = "an integer" if limits.whole else "a number"
        raise ValueError(f"{name} takes {kind} in {limits.low}..{limits.high}, not {argument}")


def apply_operation(
    image: Image.Image, name: str, argument: float, *, interpolation: str, fill: Fill
) -> Image.Image:
    """Apply one operation.

    Args:
        image: RGB, of any size; unchanged.
        name: A key of ``OPERATIONS``.
        argument: In the units of ``Operation.argument``.
        interpolation: ``"bicubic"`` or ``"bilinear"``, for the geometric operations.
        fill: RGB colour of what they move in from outside.

    Returns:
        RGB image of the same size.
    """
    return _appliers()[name](image, argument, interpolation, fill)


def _affine(image: Image.Image, matrix: tuple[float, ...], how: str, fill: Fill) -> Image.Image:
    resample = Image.Resampling[how.upper()]
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill
    )


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    table = [min(255, i + amount) if i < _SOLARIZE_ADD_BELOW else i for i in range(256)]
    return image.point(table * 3)


@cache
def _appliers() -> dict[str, _Apply]:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    tv: Any = functional
    return {
        "autocontrast": lambda image, _a, _i, _f: tv.autocontrast(image),
        "equalize": lambda image, _a, _i, _f: tv.equalize(image),
        "invert": lambda image, _a, _i, _f: tv.invert(image),
        "rotate": lambda image, degrees, how, fill: tv.rotate(
            image, degrees, interpolation=InterpolationMode(how), fill=list(fill)
        ),
        # No bits left is black; Pillow drew that until 12 and refuses it from 13 on.
        "posterize": lambda image, bits, _i, _f: (
            tv.posterize(image, int(bits)) if bits else Image.new("RGB", image.size)
        ),
        "solarize": lambda image, threshold, _i, _f: tv.solarize(image, int(threshold)),
        "solarize_add": lambda image, amount, _i, _f: _solarize_add(image, int(amount)),
        "color": lambda image, factor, _i, _f: tv.adjust_saturation(image, factor),
        "contrast": lambda image, factor, _i, _f: tv.adjust_contrast(image, factor),
        "brightness": lambda image, factor, _i, _f: tv.adjust_brightness(image, factor),
        "sharpness": lambda image, factor, _i, _f: tv.adjust_sharpness(image, factor),
        "shear_x": lambda image, slope, how, fill: _affine(
            image, (1, slope, 0, 0, 1, 0), how, fill
        ),
        "shear_y": lambda image, slope, how, fill: _affine(
            image, (1, 0, 0, slope, 1, 0), how, fill
        ),
        "translate_x": lambda image, part, how, fill: _affine(
            image, (1, 0, part * image.width, 0, 1, 0), how, fill
        ),
        "translate_y": lambda image, part, how, fill: _affine(
            image, (1, 0, 0, 0, 1, part * image.height), how, fill
        ),
    }
