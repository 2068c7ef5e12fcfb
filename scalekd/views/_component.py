"""The base classes of view components: how they are parsed, drawn, stored and applied.

A component describes a distribution; a draw from it is a tuple of steps. Two facts keep views
replayable: steps contain only numbers that the component's columns store exactly, and the words a
component draws from depend on nothing but seed, sample key, pass and the component itself.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from PIL import Image

from scalekd.errors import UsageError
from scalekd.text import MAX_CELL, printable
from scalekd.views._interpolation import Interpolation

Triple = tuple[float, float, float]
Size = tuple[int, int]
"""Height and width in pixels."""
Columns = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Arrays by name, each with its little-endian dtype and the shape of one row."""

MAX_SIDE = 2**16 - 1  # largest side of a source image or view in pixels: a crop box is four uint16
MAX_PIXELS = 89_478_485  # the limit at which Pillow warns; a quarter of a gigabyte of RGB
# Bounded, so that every matching text is a valid number; 400 decimals can write any float.
NUMBER = r"[0-9]{1,9}(?:\.[0-9]{1,400})?"


class Style(Protocol):
    """The properties of a view that its steps use; see ``ViewParams``."""

    @property
    def interpolation(self) -> Interpolation: ...
    @property
    def mean(self) -> Triple: ...
    @property
    def std(self) -> Triple: ...
    @property
    def fill(self) -> tuple[int, int, int]: ...


class Step(Protocol):
    """One resolved operation. A geometry has ``cut(image, view, size)`` instead of ``apply``."""

    def check(self) -> None:
        """Check the numbers of the step.

        Raises:
            ValueError: A number is outside its range.
        """

    def apply(self, image: Image.Image, view: Style) -> Image.Image:
        """Return a changed image of the same size."""


@dataclass(frozen=True)
class Component(ABC):
    """One part of a view policy.

    A new component needs a subclass in its own file, a line in ``_policy.COMPONENTS`` and a
    paragraph in ``docs/cache-format.md``. It does not set ``first_word``: its words then come from
    its own stream, so that the words of all other components stay the same.
    """

    name: ClassVar[str]
    """Name of the component, at most 16 ASCII letters. It begins the component's text, is part of
    the format, and selects the stream."""
    separator: ClassVar[str] = ":"
    """Separator between the name and its arguments in a policy's text."""
    grammar: ClassVar[str]
    """Description of the component's text, shown in errors about a policy's text."""
    steps: ClassVar[tuple[type, ...]]
    """Types of the component's steps."""
    first_word: ClassVar[int | None] = None
    """Index of the component's first word in the stream of the first four components."""

    @classmethod
    @abstractmethod
    def parse(cls, arguments: str | None) -> Self:
        """Make a component from the text after the separator.

        Args:
            arguments: The text; ``None`` without a separator.

        Raises:
            UsageError: The text is invalid.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Write the text that ``parse`` reads as an equal component."""

    @property
    @abstractmethod
    def num_words(self) -> int:
        """Number of random 64-bit words that a draw reads."""

    @property
    def idle(self) -> bool:
        """Whether the component never has an effect, so that a policy omits it."""
        return False

    @property
    def deterministic(self) -> bool:
        """Whether every draw gives the same steps."""
        return False

    @abstractmethod
    def draw(self, words: list[int], source: Size, view: Size) -> tuple[Any, ...]:
        """Draw the steps of a view from random words, for the sizes of source image and view."""

    def columns(self) -> Columns:
        """Return the arrays that store the component's steps."""
        return {}

    def pack(self, steps: Sequence[Any]) -> dict[str, Any]:
        """Return the row of the columns for the steps of a view; omitted columns are zero."""
        return {}

    @abstractmethod
    def unpack(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the steps stored in a row of the columns.

        Raises:
            ValueError: No draw gives this row.
        """


def number(text: str | None) -> float:
    """Read a decimal number without sign and exponent."""
    if text is None or not re.fullmatch(NUMBER, text):
        raise UsageError(f"{quoted(text or '')} is not a decimal number")
    return float(text)


def quoted(text: str) -> str:
    """Quote a part of a policy's text for a message; a long one is shortened."""
    return repr(printable(text, limit=MAX_CELL))


def plain(value: float) -> str:
    """Write the shortest decimal that reads back as ``value``, without an exponent."""
    text = format(Decimal(repr(float(value))), "f")
    return text.removesuffix(".0")
