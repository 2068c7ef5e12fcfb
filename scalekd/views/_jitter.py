"""Colour jitter: random changes of brightness, contrast, saturation and hue, in random order.

Distributions and arithmetic are those of ``torchvision.transforms.ColorJitter`` on Pillow images,
which timm uses. Factors are rounded to float16 when they are drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageEnhance

from scalekd.errors import UsageError
from scalekd.views._component import Columns, Component, Size, Style, number, plain, quoted
from scalekd.views._random import below, half_precision, uniform

_MAX_STRENGTH = 7.0  # a factor of 8, the largest that RandAugment has
_BLENDS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}
_NAMES = (*_BLENDS, "hue")


@dataclass(frozen=True, slots=True)
class Adjustment:
    """One change of colour.

    ``factor`` is a blending factor for brightness, contrast and saturation, where 1 has no effect,
    and a part of the colour circle in -0.5..0.5 for hue. It is a float16 number.
    """

    name: str
    factor: float

    def check(self) -> None:
        """Raise ``ValueError`` unless the adjustment exists and the factor is in its range."""
        if self.name not in _NAMES:
            raise ValueError(f"no adjustment {self.name!r}; there are {', '.join(_NAMES)}")
        low, high = (-0.5, 0.5) if self.name == "hue" else (0.0, 1 + _MAX_STRENGTH)
        if not low <= self.factor <= high:
            raise ValueError(f"{self.name} takes a number in {low}..{high}, not {self.factor}")

    def apply(self, image: Image.Image, view: Style) -> Image.Image:
        if self.name != "hue":
            return _BLENDS[self.name](image).enhance(self.factor)
        hue, saturation, value = image.convert("HSV").split()
        shift = int(self.factor * 255) % 256  # torchvision rounds towards zero, then wraps
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@dataclass(frozen=True)
class ColorJitter(Component):
    """Change brightness, contrast and saturation by factors in 1 ± strength, hue by ± ``hue``."""

    name: ClassVar = "jitter"
    grammar: ClassVar = """\
  jitter:S           change brightness, contrast and saturation by factors in 1-S..1+S, in a
                     random order; jitter:B-C-S and jitter:B-C-S-H state each, H (0..0.5) for hue"""
    steps: ClassVar = (Adjustment,)
    num_words: ClassVar = 1 + len(_NAMES)  # words: order; one factor of each, also of unused ones

    brightness: float
    contrast: float
    saturation: float
    hue: float = 0.0

    def __post_init__(self) -> None:
        *blends, hue = (strength for _, strength in self._strengths())
        if not all(0 <= strength <= _MAX_STRENGTH for strength in blends) or not 0 <= hue <= 0.5:
            raise UsageError(f"{self}: needs 0..7 for blends and 0..0.5 for hue")

    @classmethod
    def parse(cls, arguments: str | None) -> Self:
        strengths = [number(text) for text in (arguments or "").split("-")]
        if len(strengths) not in (1, 3, 4):
            raise UsageError(f"{quoted(arguments or '')} of jitter: needs 1, 3 or 4 numbers")
        return cls(*(strengths * 3 if len(strengths) == 1 else strengths))

    def __str__(self) -> str:
        if self.brightness == self.contrast == self.saturation and not self.hue:
            return f"jitter:{plain(self.brightness)}"
        kept = self._strengths() if self.hue else self._strengths()[:3]
        return "jitter:" + "-".join(plain(strength) for _, strength in kept)

    @property
    def idle(self) -> bool:
        return not self._active()

    def draw(self, words: list[int], source: Size, view: Size) -> tuple[Adjustment, ...]:
        drawn = [
            Adjustment(name, half_precision(uniform(word, *_range(name, strength))))
            for word, (name, strength) in zip(words[1:], self._strengths(), strict=True)
            if strength
        ]
        return _ordered(drawn, below(words[0], math.factorial(len(drawn))))

    def columns(self) -> Columns:
        """Return ``jitter``, the factors of nonzero strengths, and ``jitter_order``."""
        return {
            "jitter": (np.dtype("<f2"), (len(self._active()),)),
            "jitter_order": (np.dtype("u1"), ()),
        }

    def pack(self, steps: Sequence[Adjustment]) -> dict[str, Any]:
        factors = {step.name: step.factor for step in steps}
        drawn = tuple(Adjustment(name, factors[name]) for name in self._active() if name in factors)
        order = list(permutations(drawn)).index(tuple(steps)) if len(steps) == len(drawn) else 0
        return {"jitter": [step.factor for step in drawn], "jitter_order": order}

    def unpack(self, row: Mapping[str, Any]) -> tuple[Adjustment, ...]:
        drawn = [
            Adjustment(name, factor)
            for name, factor in zip(self._active(), row["jitter"], strict=True)
        ]
        if row["jitter_order"] >= math.factorial(len(drawn)):
            raise ValueError(f"{len(drawn)} adjustments have no order {row['jitter_order']}")
        for step in drawn:
            low, high = map(half_precision, _range(step.name, getattr(self, step.name)))
            if not low <= step.factor <= high:
                raise ValueError(f"{step} is outside {low}..{high}")
        return _ordered(drawn, row["jitter_order"])

    def _strengths(self) -> tuple[tuple[str, float], ...]:
        return tuple((name, getattr(self, name)) for name in _NAMES)

    def _active(self) -> tuple[str, ...]:
        return tuple(name for name, strength in self._strengths() if strength)


def _range(name: str, strength: float) -> tuple[float, float]:
    return (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)


def _ordered(drawn: Sequence[Adjustment], order: int) -> tuple[Adjustment, ...]:
    """Return permutation number ``order`` of ``drawn``, in lexicographic order of positions."""
    return next(islice(permutations(drawn), order, None))
