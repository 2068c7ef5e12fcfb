"""The two geometries: a random resized crop, and timm's centre view."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from PIL import Image

from scalekd.errors import DataError, UsageError
from scalekd.views._component import (
    MAX_PIXELS,
    MAX_SIDE,
    Columns,
    Component,
    Size,
    Style,
    number,
    plain,
    quoted,
)
from scalekd.views._random import below, exponential, uniform
from scalekd.views._resize import resize

TRIES = 10  # tries to place a crop or an erased box, as in timm and torchvision
_LOG_RATIO = 0.28768207245178096  # ln(4/3): a crop's aspect ratio is log-uniform in 3/4..4/3


class CropBox(NamedTuple):
    """The part of the source image, in its pixels, that is resized to the view."""

    top: int
    left: int
    height: int
    width: int

    def check(self) -> None:
        """Raise ``ValueError`` unless a box of these numbers can be inside an image."""
        inside = self.top + self.height <= MAX_SIDE and self.left + self.width <= MAX_SIDE
        if min(self.top, self.left) < 0 or min(self.height, self.width) < 1 or not inside:
            raise ValueError(f"{self} is not a box inside an image")

    def cut(self, image: Image.Image, view: Style, size: Size) -> Image.Image:
        """Cut the box from the image, then resize it.

        ``resize(box=...)`` would save a copy but lets the filter see pixels outside the box.

        Raises:
            DataError: The box is not inside the image.
        """
        top, left, height, width = self
        if top + height > image.height or left + width > image.width:
            # Pillow would pad with black.
            raise DataError(
                f"a view of rows {top}..{top + height} and columns {left}..{left + width} is not"
                f" in this image, which has {image.height} x {image.width} px: the view was drawn"
                " from another image of that key; use the data set that the cache was made from"
            )
        if (height, width) != (image.height, image.width):
            image = image.crop((left, top, left + width, top + height))
        return resize(image, size, view.interpolation)


class Middle(NamedTuple):
    """The middle of the image: timm's ``crop_pct``, the fraction that is kept of each side."""

    fraction: float

    def check(self) -> None:
        """Raise ``ValueError`` for a fraction outside (0, 1]."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"a centre view keeps a fraction in (0, 1], not {self.fraction}")

    def cut(self, image: Image.Image, view: Style, size: Size) -> Image.Image:
        """Resize the whole image, then cut, with the rounding of timm's transforms_imagenet_eval.

        Raises:
            DataError: The enlarged image would have more pixels than an image may have.
        """
        if max(size) / self.fraction > MAX_SIDE:
            raise DataError(
                f"a centre view that keeps {self.fraction} of the side is cut from more than"
                f" {MAX_SIDE:,} px"
            )
        rows, columns = (math.floor(side / self.fraction) for side in size)
        if rows == columns:
            short, long = sorted(image.size)
            long = int(rows * long / short)
            whole = (long, rows) if image.height > image.width else (rows, long)
        else:
            ratio = min(image.height / rows, image.width / columns)
            whole = (round(image.height / ratio), round(image.width / ratio))
        if whole[0] * whole[1] > MAX_PIXELS:
            raise DataError(
                f"a centre view of an image of {image.height:,} x {image.width:,} px is cut from"
                f" {whole[0]:,} x {whole[1]:,}, more than {MAX_PIXELS:,} pixels; leave such images"
                " out"
            )
        resized = resize(image, whole, view.interpolation)
        top = round((resized.height - size[0]) / 2)
        left = round((resized.width - size[1]) / 2)
        return resized.crop((left, top, left + size[1], top + size[0]))


@dataclass(frozen=True)
class RandomCrop(Component):
    """Random resized crop: a share of the area in ``scale``, an aspect ratio in 3/4..4/3."""

    name: ClassVar = "crop"
    grammar: ClassVar = (
        "  crop[:LO..HI]      random resized crop of LO..HI of the area (default 0.08..1)"
    )
    steps: ClassVar = (CropBox,)
    first_word: ClassVar = 0
    num_words: ClassVar = 4 * TRIES  # each try takes words for area, aspect, top and left

    scale: tuple[float, float] = (0.08, 1.0)

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"crop:{low}..{high}: needs 0 < LO <= HI <= 1")

    @classmethod
    def parse(cls, arguments: str | None) -> Self:
        if arguments is None:
            return cls()
        low, dots, high = arguments.partition("..")
        if not dots:
            raise UsageError(f"{quoted(arguments)} is not a range")
        return cls((number(low), number(high)))

    def __str__(self) -> str:
        low, high = map(plain, self.scale)
        return "crop" if self == RandomCrop() else f"crop:{low}..{high}"

    def draw(self, words: list[int], source: Size, view: Size) -> tuple[CropBox]:
        """Draw like timm's RandomResizedCropAndInterpolation; like torchvision's, never empty."""
        rows, columns = source
        for i in range(0, len(words), 4):
            area = uniform(words[i], *self.scale) * (rows * columns)
            ratio = exponential(uniform(words[i + 1], -_LOG_RATIO, _LOG_RATIO))
            width = round(math.sqrt(area * ratio))
            height = round(math.sqrt(area / ratio))
            if 0 < width <= columns and 0 < height <= rows:
                top = below(words[i + 2], rows - height + 1)
                left = below(words[i + 3], columns - width + 1)
                return (CropBox(top, left, height, width),)
        # No box fitted (very long images): take the middle, at the nearest allowed aspect ratio.
        height, width = rows, columns
        if columns / rows < 3 / 4:
            height = round(columns / (3 / 4))
        elif columns / rows > 4 / 3:
            width = round(rows * (4 / 3))
        return (CropBox((rows - height) // 2, (columns - width) // 2, height, width),)

    def columns(self) -> Columns:
        """Return the column ``crop``: top, left, height, width in source pixels."""
        return {"crop": (np.dtype("<u2"), (4,))}

    def pack(self, steps: Sequence[CropBox]) -> dict[str, Any]:
        return {"crop": steps[0]} if steps else {}

    def unpack(self, row: Mapping[str, Any]) -> tuple[CropBox]:
        return (CropBox(*row["crop"]),)


@dataclass(frozen=True)
class CenterCrop(Component):
    """timm's evaluation view: resize to side / ``fraction``, keep the middle."""

    name: ClassVar = "center"
    grammar: ClassVar = (
        "  center[:FRACTION]  resize, then keep the middle FRACTION (default 0.875); not random"
    )
    steps: ClassVar = (Middle,)
    deterministic: ClassVar = True
    num_words: ClassVar = 0

    fraction: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"center:{self.fraction}: needs a fraction in (0, 1]")

    @classmethod
    def parse(cls, arguments: str | None) -> Self:
        return cls() if arguments is None else cls(number(arguments))

    def __str__(self) -> str:
        return "center" if self == CenterCrop() else f"center:{plain(self.fraction)}"

    def draw(self, words: list[int], source: Size, view: Size) -> tuple[Middle]:
        return (Middle(self.fraction),)

    def unpack(self, row: Mapping[str, Any]) -> tuple[Middle]:
        return (Middle(self.fraction),)
