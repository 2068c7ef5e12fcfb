"""timm's RandAugment: fifteen operations on 8-bit RGB Pillow images, each with a resolved argument.

Definitions, order and argument units are those of timm (``timm.data.auto_augment``, the ``rand``
sets), so that a policy has the same meaning in both. Pixels come from Pillow's fixed-point code.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from scalekd.errors import UsageError
from scalekd.views._component import NUMBER, Columns, Component, Size, Style, plain, quoted
from scalekd.views._random import below, half_precision, normal, uniform
from scalekd.views._resize import pillow_name


@dataclass(frozen=True)
class OperationRange:
    """The valid arguments of a stored operation; other arguments are damage.

    Attributes:
        id: Number of the operation in a cache; it never changes. 0 means no operation.
        low: Smallest argument.
        high: Largest argument.
        whole: Whether the argument is an integer.
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

_DEFAULT_LEVEL = 10  # timm's magnitude and its limit, if m or mmax is not given
_UNIFORM_ABOVE = 100  # timm: mstd above this means magnitudes uniform in 0..m
_WORDS = 4  # words of an operation: which, whether to apply it, level, sign
_OPTION = re.compile(rf"(mstd|mmax|inc|m|n|p)({NUMBER})")
_FIELDS = {"m": "magnitude", "n": "num_operations", "p": "probability"}
_FIELDS |= {"mstd": "magnitude_std", "mmax": "max_magnitude", "inc": "increasing"}
_SOLARIZE_ADD_BELOW = 128  # timm's threshold: brighter values do not change
_ADJUSTMENTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
}
_BLENDS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}
_NAMES = tuple(OPERATIONS)  # in timm's order (auto_augment._RAND_TRANSFORMS), which draws index


class Operation(NamedTuple):
    """One applied operation with its resolved argument.

    ``argument`` is signed degrees (rotate), a blending factor (color, contrast, brightness,
    sharpness), bits kept (posterize), a threshold (solarize), an amount (solarize_add), a slope
    (shear_x, shear_y) or a fraction of the side (translate_x, translate_y); 0 without an argument.
    It is always a float16 number, which the cache stores exactly.
    """

    name: str
    argument: float = 0.0

    def check(self) -> None:
        """Raise ``ValueError`` unless the operation exists and the argument is in its range."""
        limits = OPERATIONS.get(self.name)
        if limits is None:
            raise ValueError(f"no operation {self.name!r}; there are {', '.join(OPERATIONS)}")
        low, high = limits.low, limits.high
        if not low <= self.argument <= high or (limits.whole and self.argument % 1):
            kind = "an integer" if limits.whole else "a number"
            raise ValueError(f"{self.name} takes {kind} in {low}..{high}, not {self.argument}")

    def apply(self, image: Image.Image, view: Style) -> Image.Image:
        name, argument = self
        if name in _ADJUSTMENTS:
            return _ADJUSTMENTS[name](image)
        if name in _BLENDS:
            return _BLENDS[name](image).enhance(argument)
        if name == "posterize":
            # Zero bits give black; Pillow supports that until 12 and refuses it from 13 on.
            black = Image.new("RGB", image.size)
            return ImageOps.posterize(image, int(argument)) if argument else black
        if name == "solarize":
            return ImageOps.solarize(image, int(argument))
        if name == "solarize_add":
            added = (min(255, level + int(argument)) for level in range(_SOLARIZE_ADD_BELOW))
            return image.point([*added, *range(_SOLARIZE_ADD_BELOW, 256)] * 3)
        resample = Image.Resampling[pillow_name(view.interpolation).upper()]
        if name == "rotate":
            return image.rotate(argument, resample, fillcolor=view.fill)
        matrix = {
            "shear_x": (1, argument, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, argument, 1, 0),
            "translate_x": (1, 0, argument * image.width, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, argument * image.height),
        }[name]
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=view.fill
        )


@dataclass(frozen=True)
class RandAugment(Component):
    """timm's RandAugment: ``num_operations`` drawn with replacement, each applied or not.

    Attributes:
        magnitude: Mean level on timm's scale of 10.
        num_operations: Number of operations drawn per view.
        probability: Probability that a drawn operation is applied.
        magnitude_std: Standard deviation of a normal level; above 100 the level is uniform in
            0..magnitude.
        max_magnitude: Largest level.
        increasing: Whether to use the set of operations whose severity grows with the level.
    """

    name: ClassVar = "rand"
    separator: ClassVar = "-"
    grammar: ClassVar = """\
  rand-m9-n2-mstd0.5-inc1
                     RandAugment as timm writes it: m magnitude, n operations, p probability of
                     each, mstd spread of the magnitude, mmax its limit, inc1 increasing severity"""
    steps: ClassVar = (Operation,)
    first_word: ClassVar = 83

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

    @classmethod
    def parse(cls, arguments: str | None) -> Self:
        fields: dict[str, Any] = {}
        for option in arguments.split("-") if arguments is not None else ():
            match = _OPTION.fullmatch(option)
            if match is None or _FIELDS[match[1]] in fields:
                problem = "no option" if match is None else "given twice"
                raise UsageError(f"{quoted(option)} of rand: {problem}")
            name, number = match.groups()
            if name in ("p", "mstd"):
                fields[_FIELDS[name]] = float(number)
            elif "." in number or (name == "inc" and number not in ("0", "1")):
                raise UsageError(f"{quoted(option)} of rand: needs an integer")
            else:
                fields[_FIELDS[name]] = bool(int(number)) if name == "inc" else int(number)
        return cls(**fields)

    def __str__(self) -> str:
        text = f"rand-m{self.magnitude}-n{self.num_operations}"
        text += f"-p{plain(self.probability)}" if self.probability != 0.5 else ""
        text += f"-mstd{plain(self.magnitude_std)}" if self.magnitude_std else ""
        text += f"-mmax{self.max_magnitude}" if self.max_magnitude != _DEFAULT_LEVEL else ""
        return text + ("-inc1" if self.increasing else "")

    @property
    def deterministic(self) -> bool:
        return self.probability == 0

    @property
    def num_words(self) -> int:
        return _WORDS * self.num_operations

    def draw(self, words: list[int], source: Size, view: Size) -> tuple[Operation, ...]:
        """Draw like timm's RandAugment and AugmentOp; return only the applied operations."""
        operations = []
        for i in range(0, len(words), _WORDS):
            which, whether, spread, sign = words[i : i + _WORDS]
            if uniform(whether) >= self.probability:
                continue
            level = float(self.magnitude)
            if self.magnitude_std > _UNIFORM_ABOVE:
                level = uniform(spread, 0, level)
            elif self.magnitude_std:
                level += self.magnitude_std * normal(spread)
            level = max(0.0, min(level, self.max_magnitude)) / 10
            name = _NAMES[below(which, len(_NAMES))]
            argument = _argument(name, level, -1 if sign >> 63 else 1, increasing=self.increasing)
            operations.append(Operation(name, half_precision(argument)))
        return tuple(operations)

    def columns(self) -> Columns:
        """Return ``operations`` (ids, applied ones first, then 0) and ``arguments``."""
        slots = (self.num_operations,)
        return {"operations": (np.dtype("u1"), slots), "arguments": (np.dtype("<f2"), slots)}

    def pack(self, steps: Sequence[Operation]) -> dict[str, Any]:
        unused = [0] * (self.num_operations - len(steps))
        return {
            "operations": [OPERATIONS[step.name].id for step in steps] + unused,
            "arguments": [step.argument for step in steps] + unused,
        }

    def unpack(self, row: Mapping[str, Any]) -> tuple[Operation, ...]:
        ids, arguments = row["operations"], row["arguments"]
        count = sum(1 for id_ in ids if id_)
        if any(ids[count:]) or any(arguments[count:]):
            raise ValueError(f"operations {ids} with arguments {arguments} leave gaps")
        for id_ in ids[:count]:
            if id_ > len(_NAMES):
                raise ValueError(f"no operation has the number {id_}")
        return tuple(
            Operation(_NAMES[id_ - 1], argument)
            for id_, argument in zip(ids[:count], arguments, strict=False)
        )


def _argument(name: str, level: float, sign: int, *, increasing: bool) -> float:
    """Compute an argument like timm's ``level_to_arg``; ``level`` 1 is timm's magnitude 10."""
    if name == "rotate":
        return sign * level * 30.0
    if name in ("shear_x", "shear_y"):
        return sign * level * 0.3
    if name in ("translate_x", "translate_y"):
        return sign * level * 0.45
    if name in ("color", "contrast", "brightness", "sharpness"):
        return max(0.1, 1.0 + sign * level * 0.9) if increasing else level * 1.8 + 0.1
    if name == "posterize":
        # timm does not change the image above 8 bits and blackens it below 0: these are the limits.
        bits = int(level * 4)
        return max(0, 4 - bits) if increasing else min(8, bits)
    if name == "solarize":
        threshold = min(256, int(level * 256))
        return 256 - threshold if increasing else threshold
    if name == "solarize_add":
        return min(128, int(level * 110))
    return 0.0
