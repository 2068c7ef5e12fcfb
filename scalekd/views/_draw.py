"""Draw a view: from (policy, seed, key, pass) to resolved parameters.

The distributions are those of timm and torchvision; timm's functions are named where they are
followed. Every random decision reads a fixed place of the view's stream, so that changing the
probability of one component leaves every decision of the others as it was.
"""

import math
import struct

from scalekd.errors import UsageError
from scalekd.views._components import CenterCrop, RandAugment, RandomCrop
from scalekd.views._params import ERASE_UNIT, MAX_SIDE, CropBox, EraseBox, Operation, ViewParams
from scalekd.views._policy import ViewPolicy
from scalekd.views._random import below, exponential, normal, uniform, view_words

_TRIES = 10  # of a crop, and of an erased box, before giving up: timm, torchvision
_LOG_RATIO = 0.28768207245178096  # ln(4/3): a crop's aspect ratio is log-uniform in 3/4..4/3
_ERASE_AREA = (0.02, 1 / 3)  # timm RandomErasing: share of the view, uniform
_LOG_ERASE_ASPECT = 1.2039728043259361  # ln(1/0.3): height over width, log-uniform in 0.3..3.3

# Places in the stream. A try takes four words: area, aspect, top, left.
_CROP = 0
_FLIP = _CROP + 4 * _TRIES
_ERASE = _FLIP + 1
_ERASE_TRIES = _ERASE + 1
_NOISE_SEED = _ERASE_TRIES + 4 * _TRIES
_RAND = _NOISE_SEED + 1  # last, because its length depends on the policy
_WORDS_PER_OPERATION = 4  # which, whether, level, sign

# timm's order (auto_augment._RAND_TRANSFORMS), which the draw indexes.
_RAND_NAMES = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


def draw(
    policy: ViewPolicy,
    *,
    seed: int,
    key: str,
    pass_index: int,
    source_size: tuple[int, int],
    view_size: tuple[int, int],
) -> ViewParams:
    """Draw one view of one sample.

    Args:
        policy: What to draw from.
        seed: The cache's seed, in 0..2**64 - 1.
        key: The sample's key.
        pass_index: Which pass over the samples, from 0.
        source_size: Height and width of the decoded image, in pixels.
        view_size: Height and width the view is drawn for; it decides the erased boxes only,
            whose sides are whole pixels at this size.

    Returns:
        The view; equal arguments give equal views on every machine.

    Raises:
        UsageError: A size or the seed is out of range.
    """
    if not all(1 <= side <= MAX_SIDE for side in (*source_size, *view_size)):
        raise UsageError(
            f"sample {key}: a view of {view_size} px from an image of {source_size} px: "
            f"sides must be in 1..{MAX_SIDE}"
        )
    num_operations = policy.rand.num_operations if policy.rand else 0
    count = _RAND + _WORDS_PER_OPERATION * num_operations
    words = view_words(seed, key, pass_index, count)
    center = policy.geometry.fraction if isinstance(policy.geometry, CenterCrop) else None
    erase = None
    if uniform(words[_ERASE]) < policy.erase:
        erase = _draw_erase(words[_ERASE_TRIES:_NOISE_SEED], view_size)
    return ViewParams(
        crop=_draw_crop(policy.geometry, words[_CROP:_FLIP], source_size)
        if isinstance(policy.geometry, RandomCrop)
        else None,
        center=center,
        flip=uniform(words[_FLIP]) < policy.flip,
        operations=_draw_operations(policy.rand, words[_RAND:]) if policy.rand else (),
        erase=erase,
        noise_seed=words[_NOISE_SEED] >> 32 if erase else 0,
        interpolation=policy.interpolation,
        mean=policy.mean,
        std=policy.std,
    )


def _draw_crop(crop: RandomCrop, words: list[int], source_size: tuple[int, int]) -> CropBox:
    """As timm RandomResizedCropAndInterpolation.get_params; like torchvision's, never empty."""
    rows, columns = source_size
    for i in range(0, len(words), 4):
        area = uniform(words[i], *crop.scale) * (rows * columns)
        ratio = exponential(uniform(words[i + 1], -_LOG_RATIO, _LOG_RATIO))
        width = round(math.sqrt(area * ratio))
        height = round(math.sqrt(area / ratio))
        if 0 < width <= columns and 0 < height <= rows:
            top = below(words[i + 2], rows - height + 1)
            left = below(words[i + 3], columns - width + 1)
            return CropBox(top, left, height, width)
    # No box fitted, as in very long images: the middle, at the nearest aspect ratio allowed.
    height, width = rows, columns
    if columns / rows < 3 / 4:
        height = round(columns / (3 / 4))
    elif columns / rows > 4 / 3:
        width = round(rows * (4 / 3))
    return CropBox((rows - height) // 2, (columns - width) // 2, height, width)


def _draw_erase(words: list[int], view_size: tuple[int, int]) -> EraseBox | None:
    """As timm RandomErasing._erase with one box; None when none of the tries fits."""
    rows, columns = view_size
    for i in range(0, len(words), 4):
        area = uniform(words[i], *_ERASE_AREA) * (rows * columns)
        aspect = exponential(uniform(words[i + 1], -_LOG_ERASE_ASPECT, _LOG_ERASE_ASPECT))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if 0 < width < columns and 0 < height < rows:
            top = below(words[i + 2], rows - height + 1)
            left = below(words[i + 3], columns - width + 1)
            return EraseBox(
                _fraction(top, rows),
                _fraction(left, columns),
                _fraction(height, rows),
                _fraction(width, columns),
            )
    return None


def _fraction(pixels: int, side: int) -> int:
    """``pixels / side`` in 65,536ths, with as few significant bits as give ``pixels`` back.

    A grid of 2**bits >= side points is within half a pixel of every pixel edge; the remaining low
    bits are zero, which compresses: at up to 256 px an edge costs one byte.
    """
    bits = (side - 1).bit_length()
    step = ERASE_UNIT >> bits
    return (2 * pixels * ERASE_UNIT + side * step) // (2 * side * step) * step


def _draw_operations(rand: RandAugment, words: list[int]) -> tuple[Operation, ...]:
    """As timm RandAugment.__call__ and AugmentOp.__call__; unapplied operations leave no trace."""
    operations = []
    for i in range(0, len(words), _WORDS_PER_OPERATION):
        which, whether, spread, sign = words[i : i + _WORDS_PER_OPERATION]
        if uniform(whether) >= rand.probability:
            continue
        level = float(rand.magnitude)
        if rand.uniform_magnitude:
            level = uniform(spread, 0, level)
        elif rand.magnitude_std:
            level += rand.magnitude_std * normal(spread)
        level = max(0.0, min(level, rand.max_magnitude)) / 10
        name = _RAND_NAMES[below(which, len(_RAND_NAMES))]
        argument = _argument(name, level, -1 if sign >> 63 else 1, increasing=rand.increasing)
        # Storage is float16. Rounding now makes the first draw use the stored number.
        (argument,) = struct.unpack("<e", struct.pack("<e", argument))
        operations.append(Operation(name, argument))
    return tuple(operations)


def _argument(name: str, level: float, sign: int, *, increasing: bool) -> float:
    """As timm's ``level_to_arg`` functions; ``level`` 1 is timm's magnitude 10."""
    if name == "rotate":
        return sign * level * 30.0
    if name in ("shear_x", "shear_y"):
        return sign * level * 0.3
    if name in ("translate_x", "translate_y"):
        return sign * level * 0.45
    if name in ("color", "contrast", "brightness", "sharpness"):
        return max(0.1, 1.0 + sign * level * 0.9) if increasing else level * 1.8 + 0.1
    if name == "posterize":
        # timm leaves the image alone above 8 bits and blackens it below 0: these are the limits.
        bits = int(level * 4)
        return max(0, 4 - bits) if increasing else min(8, bits)
    if name == "solarize":
        threshold = min(256, int(level * 256))
        return 256 - threshold if increasing else threshold
    if name == "solarize_add":
        return min(128, int(level * 110))
    return 0.0
