"""What a component of a view policy is: how it is written, drawn, stored and applied.

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
"""Arrays by name: little-endian dtype, and the shape of one row."""

MAX_SIDE = 2**16 - 1  # of a source image and of a view, in pixels: a crop box is four uint16
MAX_PIXELS = 89_478_485  # Pillow's own warning level, a quarter of a gigabyte of RGB
# Bounded, so that no text makes a number that cannot be read; 400 decimals hold any float.
NUMBER = r"[0-9]{1,9}(?:\.[0-9]{1,400})?"


class Style(Protocol):
    """What all steps of a view share; see ``ViewParams``."""

    @property
    def interpolation(self) -> Interpolation: ...
    @property
    def mean(self) -> Triple: ...
    @property
    def std(self) -> Triple: ...
    @property
    def fill(self) -> tuple[int, int, int]: ...


class Step(Protocol):
    """One resolved operation. A geometry's has ``cut(image, view, size)`` in place of ``apply``."""

    def check(self) -> None:
        """Raise ``ValueError`` where a number is outside its range."""

    def apply(self, image: Image.Image, view: Style) -> Image.Image:
        """Return a changed image of the same size."""


@dataclass(frozen=True)
class Component(ABC):
    """One part of a view policy.

    A subclass in a file of its own, a line in ``_policy.COMPONENTS`` and a paragraph in
    ``docs/cache-format.md`` are all that a new component takes. It leaves ``first_word`` alone:
    its words then come from a stream of its own, so that no other component draws other words.
    """

    name: ClassVar[str]
    """How its text begins; at most 16 ASCII letters. Part of the format, and of its stream."""
    separator: ClassVar[str] = ":"
    """What stands between the name and its arguments in a policy's text."""
    grammar: ClassVar[str]
    """Lines of the list that errors about a policy's text show."""
    steps: ClassVar[tuple[type, ...]]
    """Types of its steps."""
    first_word: ClassVar[int | None] = None
    """Index of its first word in the stream that the first four components share."""

    @classmethod
    @abstractmethod
    def parse(cls, arguments: str | None) -> Self:
        """Read the text after the separator, ``None`` without one, or raise ``UsageError``."""

    @abstractmethod
    def __str__(self) -> str:
        """Write the text that ``parse`` reads as an equal component."""

    @property
    @abstractmethod
    def num_words(self) -> int:
        """Random words of 64 bits that a draw reads."""

    @property
    def idle(self) -> bool:
        """Whether it never does anything, so that a policy leaves it out."""
        return False

    @property
    def deterministic(self) -> bool:
        """Whether every draw gives the same steps."""
        return False

    @abstractmethod
    def draw(self, words: list[int], source: Size, view: Size) -> tuple[Any, ...]:
        """Resolve every random decision, for a source image and a view of these sizes."""

    def columns(self) -> Columns:
        """Give the arrays that store its steps."""
        return {}

    def pack(self, steps: Sequence[Any]) -> dict[str, Any]:
        """Give a row of the columns for its steps of a view; a column left out is zero."""
        return {}

    @abstractmethod
    def unpack(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """Read a row of the columns, or raise ``ValueError`` for one that no draw gives."""


def number(text: str | None) -> float:
    """Read a decimal number without sign and exponent."""
    if text is None or not re.fullmatch(NUMBER, text):
        raise UsageError(f"{quoted(text or '')} is no decimal number")
    return float(text)


def quoted(text: str) -> str:
    """Quote a part of a policy's text in a message, however long it is."""
    return repr(printable(text, limit=MAX_CELL))


def plain(value: float) -> str:
    """Write the shortest decimal that reads back as ``value``, without an exponent."""
    text = format(Decimal(repr(float(value))), "f")
    return text.removesuffix(".0")
