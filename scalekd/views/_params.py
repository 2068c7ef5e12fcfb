"""One view, fully resolved: everything needed to redraw it, and nothing that needs a random number.

Geometry is independent of the size a view is rendered at: the crop is a box in source pixels, the
erased box is a fraction of the view. So a student may replay a view at another resolution than
the teacher's. Only the noise inside an erased box needs numbers, which come from ``noise_seed``.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from scalekd.views._operations import check_operation

Interpolation = Literal["bicubic", "bilinear", "bilinear-opencv"]
Triple = tuple[float, float, float]

MAX_SIDE = 2**16 - 1  # of a source image and of a view, in pixels: a crop box is four uint16
MAX_PIXELS = 89_478_485  # Pillow's own warning level, a quarter of a gigabyte of RGB
ERASE_UNIT = 2**16  # an erased box is stored in 65,536ths of the view's height and width


class CropBox(NamedTuple):
    """Part of the source image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class EraseBox(NamedTuple):
    """Part of the view replaced by noise, in 65,536ths of the view's height and width."""

    top: int
    left: int
    height: int
    width: int


class Operation(NamedTuple):
    """One applied RandAugment operation with its resolved argument.

    Attributes:
        name: A key of ``scalekd.views.OPERATIONS``.
        argument: Signed degrees (rotate), blend factor (color, contrast, brightness, sharpness),
            bits kept (posterize), threshold (solarize), amount (solarize_add), slope (shear_x,
            shear_y), fraction of the side (translate_x, translate_y); 0 where there is none.
            Always a float16 number, so that storing it loses nothing.
    """

    name: str
    argument: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewParams:
    """Everything that decides a view's pixels, given the source image and the size to render.

    Attributes:
        crop: Box to cut and resize, or None for a centre view.
        center: Fraction of the resized shorter side that a centre view keeps (timm's
            ``crop_pct``), or None for a cropped view.
        flip: Mirrored left to right, after the crop and before the operations.
        operations: Applied in this order.
        erase: Box replaced by noise, last of all, or None.
        noise_seed: Seed of that noise, below 2**32; 0 without an erased box.
        interpolation: Filter of the resize, and of rotation, shear and translation.
        mean: RGB mean in 0..1: what geometric operations fill with, and the noise's mean.
        std: RGB standard deviation in 0..1 of the noise.

    Raises:
        ValueError: A field is outside its range.
    """

    crop: CropBox | None
    center: float | None
    flip: bool
    operations: tuple[Operation, ...]
    erase: EraseBox | None
    noise_seed: int
    interpolation: Interpolation
    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        if (self.crop is None) == (self.center is None):
            raise ValueError("a view has either a crop box or a centre fraction")
        if self.crop is not None:
            top, left, height, width = self.crop
            inside = top + height <= MAX_SIDE and left + width <= MAX_SIDE
            if min(top, left) < 0 or min(height, width) < 1 or not inside:
                raise ValueError(f"{self.crop} is no box inside an image")
        if self.center is not None and not 0 < self.center <= 1:
            raise ValueError(f"a centre view keeps a fraction in (0, 1], not {self.center}")
        for operation in self.operations:
            check_operation(operation.name, operation.argument)
        if self.erase is not None:
            top, left, height, width = self.erase
            inside = top + height <= ERASE_UNIT and left + width <= ERASE_UNIT
            smaller = min(height, width) >= 1 and max(height, width) < ERASE_UNIT
            if min(top, left) < 0 or not inside or not smaller:
                raise ValueError(f"{self.erase} is no box inside a view and smaller than it")
        if not 0 <= self.noise_seed < 2**32:
            raise ValueError(f"a noise seed is in 0..2**32 - 1, not {self.noise_seed}")

    @property
    def fill(self) -> tuple[int, int, int]:
        """RGB colour that rotation, shear and translation move in from outside the view."""
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        return red, green, blue
