"""Random erasing: a box of the view is replaced by noise, as in timm before normalisation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from PIL import Image

from scalekd.errors import UsageError
from scalekd.views._component import Columns, Component, Size, Style, number, plain
from scalekd.views._crop import TRIES
from scalekd.views._random import below, exponential, noise_table, noise_words, uniform

ERASE_UNIT = 2**16  # an erased box is stored in 65,536ths of the view's height and width
_AREA = (0.02, 1 / 3)  # timm RandomErasing: share of the view, uniform
_LOG_ASPECT = 1.2039728043259361  # ln(1/0.3): height over width, log-uniform in 0.3..3.3


class EraseBox(NamedTuple):
    """The part of the view that is replaced by noise.

    Position and size are in 65,536ths of the view's height and width, so that a view can be
    rendered at another size; the noise comes from ``noise_seed``, below 2**32.
    """

    top: int
    left: int
    height: int
    width: int
    noise_seed: int

    def check(self) -> None:
        """Raise ``ValueError`` unless the box is inside and smaller than a view, with a seed."""
        top, left, height, width, noise_seed = self
        inside = top + height <= ERASE_UNIT and left + width <= ERASE_UNIT
        smaller = min(height, width) >= 1 and max(height, width) < ERASE_UNIT
        if min(top, left) < 0 or not inside or not smaller:
            raise ValueError(f"{self} is not a box inside a view and smaller than it")
        if not 0 <= noise_seed < 2**32:
            raise ValueError(f"a noise seed is in 0..2**32 - 1, not {noise_seed}")

    def apply(self, image: Image.Image, view: Style) -> Image.Image:
        rows, columns = image.height, image.width
        top, left = _pixels(self.top, rows), _pixels(self.left, columns)
        # At another size, rounding may exceed the side.
        height = min(rows - top, max(1, _pixels(self.height, rows)))
        width = min(columns - left, max(1, _pixels(self.width, columns)))
        words = noise_words(self.noise_seed, 3 * height * width).reshape(3, height, width)
        noise = np.empty((height, width, 3), np.uint8)
        for channel in range(3):
            noise[..., channel] = noise_table(view.mean[channel], view.std[channel])[words[channel]]
        erased = image.copy()
        if noise.size:
            erased.paste(Image.fromarray(noise), (left, top))
        return erased


def _pixels(fraction: int, side: int) -> int:
    """Round a stored fraction of ``side`` to pixels; the inverse of ``_fraction``."""
    return (2 * fraction * side + ERASE_UNIT) // (2 * ERASE_UNIT)


def _fraction(pixels: int, side: int) -> int:
    """Return ``pixels / side`` in 65,536ths, with the fewest significant bits that are exact.

    A grid of 2**bits >= side points is within half a pixel of every pixel edge; the remaining low
    bits are zero, which compresses: at up to 256 px an edge costs one byte.
    """
    bits = (side - 1).bit_length()
    step = ERASE_UNIT >> bits
    return (2 * pixels * ERASE_UNIT + side * step) // (2 * side * step) * step


@dataclass(frozen=True)
class Erase(Component):
    """Replace one box by noise with ``probability``."""

    name: ClassVar = "erase"
    grammar: ClassVar = "  erase:P            replace a box by pixel noise with probability P"
    steps: ClassVar = (EraseBox,)
    first_word: ClassVar = 41
    # Words: whether to erase; area, aspect, top, left of each try; noise seed.
    num_words: ClassVar = 2 + 4 * TRIES

    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UsageError(f"erase:{self.probability}: needs a probability in 0..1")

    @classmethod
    def parse(cls, arguments: str | None) -> Self:
        return cls(number(arguments))

    def __str__(self) -> str:
        return f"erase:{plain(self.probability)}"

    @property
    def idle(self) -> bool:
        return not self.probability

    def draw(self, words: list[int], source: Size, view: Size) -> tuple[EraseBox, ...]:
        """Draw like timm's RandomErasing._erase with one box; no step if no try fits."""
        rows, columns = view
        for i in range(1, len(words) - 1, 4) if uniform(words[0]) < self.probability else ():
            area = uniform(words[i], *_AREA) * (rows * columns)
            aspect = exponential(uniform(words[i + 1], -_LOG_ASPECT, _LOG_ASPECT))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if 0 < width < columns and 0 < height < rows:
                top = _fraction(below(words[i + 2], rows - height + 1), rows)
                left = _fraction(below(words[i + 3], columns - width + 1), columns)
                height, width = _fraction(height, rows), _fraction(width, columns)
                return (EraseBox(top, left, height, width, words[-1] >> 32),)
        return ()

    def columns(self) -> Columns:
        """Return ``erase`` (top, left, height, width; all 0 without a box) and ``noise_seed``."""
        return {"erase": (np.dtype("<u2"), (4,)), "noise_seed": (np.dtype("<u4"), ())}

    def pack(self, steps: Sequence[EraseBox]) -> dict[str, Any]:
        return {"erase": steps[0][:4], "noise_seed": steps[0].noise_seed} if steps else {}

    def unpack(self, row: Mapping[str, Any]) -> tuple[EraseBox, ...]:
        if any(row["erase"]):
            return (EraseBox._make([*row["erase"], row["noise_seed"]]),)
        if row["noise_seed"]:
            raise ValueError("noise without an erased box")
        return ()
