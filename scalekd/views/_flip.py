"""Horizontal mirroring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from scalekd.errors import UsageError
from scalekd.views._component import Columns, Component, Size, Style, number, plain
from scalekd.views._random import uniform


@dataclass(frozen=True, slots=True)
class Mirror:
    """Mirror the view left to right."""

    def check(self) -> None:
        """Do nothing: the step has no numbers."""

    def apply(self, image: Image.Image, view: Style) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@dataclass(frozen=True)
class Flip(Component):
    """Mirror views with ``probability``."""

    name: ClassVar = "flip"
    grammar: ClassVar = "  flip[:P]           mirror with probability P (default 0.5)"
    steps: ClassVar = (Mirror,)
    first_word: ClassVar = 40
    num_words: ClassVar = 1

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UsageError(f"flip:{self.probability}: needs a probability in 0..1")

    @classmethod
    def parse(cls, arguments: str | None) -> Self:
        return cls() if arguments is None else cls(number(arguments))

    def __str__(self) -> str:
        return "flip" if self == Flip() else f"flip:{plain(self.probability)}"

    @property
    def idle(self) -> bool:
        return not self.probability

    @property
    def deterministic(self) -> bool:
        return self.probability == 1

    def draw(self, words: list[int], source: Size, view: Size) -> tuple[Mirror, ...]:
        return (Mirror(),) if uniform(words[0]) < self.probability else ()

    def columns(self) -> Columns:
        """Return the column ``flip``, 1 for a mirrored view."""
        return {} if self.deterministic else {"flip": (np.dtype("u1"), ())}

    def pack(self, steps: Sequence[Mirror]) -> dict[str, Any]:
        return {"flip": len(steps)}

    def unpack(self, row: Mapping[str, Any]) -> tuple[Mirror, ...]:
        flip = row.get("flip", 1)
        if flip not in (0, 1):
            raise ValueError(f"flip is {flip}")
        return (Mirror(),) if flip else ()
