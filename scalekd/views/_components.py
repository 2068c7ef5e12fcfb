"""The components of a view policy: what each means, how it is written, and how it is read."""

import difflib
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from scalekd.errors import UsageError

PRESETS = {"crop-flip": "crop+flip"}
POLICY_GRAMMAR = """\
A view policy is one geometry, then any of flip, rand and erase, joined by "+":
  crop[:LO..HI]      random resized crop of LO..HI of the area (default 0.08..1)
  center[:FRACTION]  resize, then keep the middle FRACTION (default 0.875); not random
  flip[:P]           mirror with probability P (default 0.5)
  rand-m9-n2-mstd0.5-inc1
                     RandAugment as timm writes it: m magnitude, n operations, p probability of
                     each, mstd spread of the magnitude, mmax its limit, inc1 increasing severity
  erase:P            replace a box by pixel noise with probability P
or a preset: crop-flip (= crop+flip), center."""

_DEFAULT_LEVEL = 10  # timm's magnitude, and its limit, when m or mmax is not given
_UNIFORM_ABOVE = 100  # timm: mstd above this means magnitudes uniform in 0..m
# Bounded, so that no text makes a number that cannot be read; 400 decimals hold any float.
_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,400})?")
_RAND_OPTION = re.compile(rf"(mstd|mmax|inc|m|n|p)({_NUMBER.pattern})")


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crop: a share of the area in ``scale``, an aspect ratio in 3/4..4/3."""

    scale: tuple[float, float] = (0.08, 1.0)

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"crop:{low}..{high}: needs 0 < LO <= HI <= 1")

    def __str__(self) -> str:
        low, high = map(plain, self.scale)
        return "crop" if self == RandomCrop() else f"crop:{low}..{high}"


@dataclass(frozen=True)
class CenterCrop:
    """timm's evaluation view: resize to side / ``fraction``, keep the middle."""

    fraction: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"center:{self.fraction}: needs a fraction in (0, 1]")

    def __str__(self) -> str:
        return "center" if self == CenterCrop() else f"center:{plain(self.fraction)}"


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment: ``num_operations`` drawn with replacement, each applied or not.

    Attributes:
        magnitude: Level on timm's scale of 10.
        num_operations: Operations drawn a view.
        probability: That a drawn operation is applied.
        magnitude_std: Spread of the level, normal; above 100: uniform in 0..magnitude.
        max_magnitude: Levels are cut at this.
        increasing: Use the set whose severity always grows with the level.
    """

    magnitude: int = _DEFAULT_LEVEL
    num_operations: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    max_magnitude: int = _DEFAULT_LEVEL
    increasing: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= 30 or not 1 <= self.max_magnitude <= 30:
            raise UsageError(f"{self}: m needs 0..30 and mmax 1..30")
        if not 1 <= self.num_operations <= 16:
            raise UsageError(f"{self}: n needs 1..16")
        if not 0 <= self.probability <= 1 or not 0 <= self.magnitude_std <= 1000:
            raise UsageError(f"{self}: p needs 0..1 and mstd 0..1000")

    @property
    def uniform_magnitude(self) -> bool:
        return self.magnitude_std > _UNIFORM_ABOVE

    def __str__(self) -> str:
        text = f"rand-m{self.magnitude}-n{self.num_operations}"
        text += f"-p{plain(self.probability)}" if self.probability != 0.5 else ""
        text += f"-mstd{plain(self.magnitude_std)}" if self.magnitude_std else ""
        text += f"-mmax{self.max_magnitude}" if self.max_magnitude != _DEFAULT_LEVEL else ""
        return text + ("-inc1" if self.increasing else "")


def parse_component(component: str, text: str) -> tuple[str, Any]:
    """The field of ViewPolicy that one component sets, and its value."""
    if component == "rand" or component.startswith("rand-"):
        return "rand", _parse_rand(component, text)
    name, colon, argument = component.partition(":")
    if name == "crop":
        low, dots, high = argument.partition("..")
        if not colon:
            return "geometry", RandomCrop()
        if not dots:
            raise UsageError(f"{component!r} in view policy {text!r} is no range\n{POLICY_GRAMMAR}")
        return "geometry", RandomCrop((_number(low, text), _number(high, text)))
    if name == "center":
        return "geometry", CenterCrop(_number(argument, text)) if colon else CenterCrop()
    if name == "flip":
        return "flip", _number(argument, text) if colon else 0.5
    if name == "erase":
        return "erase", _number(argument, text)
    raise UsageError(f"view policy {text!r}: {_unknown(name)}\n{POLICY_GRAMMAR}")


def _parse_rand(component: str, text: str) -> RandAugment:
    fields: dict[str, Any] = {}
    names = {"m": "magnitude", "n": "num_operations", "p": "probability"}
    names |= {"mstd": "magnitude_std", "mmax": "max_magnitude", "inc": "increasing"}
    for option in component.split("-")[1:]:
        match = _RAND_OPTION.fullmatch(option)
        if match is None or names[match[1]] in fields:
            problem = "no option" if match is None else "given twice"
            raise UsageError(
                f"view policy {text!r}: {option!r} of rand: {problem}\n{POLICY_GRAMMAR}"
            )
        name, number = match.groups()
        if name in ("p", "mstd"):
            fields[names[name]] = float(number)
        elif "." in number or (name == "inc" and number not in ("0", "1")):
            raise UsageError(
                f"view policy {text!r}: {option!r}: needs an integer\n{POLICY_GRAMMAR}"
            )
        else:
            fields[names[name]] = bool(int(number)) if name == "inc" else int(number)
    return RandAugment(**fields)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, ["crop", "center", "flip", "rand", "erase", *PRESETS])
    hint = f"; the nearest is {' or '.join(close)}" if close else ""
    return f"no component {name!r}{hint}"


def _number(text: str, policy: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise UsageError(f"view policy {policy!r}: {text!r} is no decimal number\n{POLICY_GRAMMAR}")
    return float(text)


def plain(value: float) -> str:
    """The shortest decimal that reads back as ``value``, without an exponent."""
    text = format(Decimal(repr(float(value))), "f")
    return text.removesuffix(".0")
