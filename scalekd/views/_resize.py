"""Resize filters of views, in fixed point, so that pixels do not depend on the processor.

``bicubic`` and ``bilinear`` are Pillow's: they average over all the pixels that a smaller picture
covers. ``bilinear-opencv`` is ``cv2.resize`` with ``INTER_LINEAR``, which most code based on
OpenCV trains with: it always reads four pixels, and so aliases when a picture shrinks.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_WEIGHT_UNIT = 2048  # OpenCV: INTER_RESIZE_COEF_SCALE


def resize(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """Resize an RGB image.

    Args:
        image: RGB image, which is not changed.
        size: Height and width in pixels.
        interpolation: A filter of `scalekd.views.Interpolation`.
    """
    if interpolation == "bilinear-opencv":
        return Image.fromarray(_linear(np.asarray(image), size))
    # Columns, then rows, with 8-bit values between, as Pillow did in one call until 12. From 13 on
    # Pillow swaps the two for images that shrink more in height than in width, which moves a
    # bicubic pixel by up to 20. One axis per call fixes the order.
    height, width = size
    resample = Image.Resampling[interpolation.upper()]
    if width != image.width:
        image = image.resize((width, image.height), resample=resample)
    return image.resize((width, height), resample=resample)


def pillow_name(interpolation: str) -> str:
    """Return the most similar filter of Pillow and timm, for geometric operations."""
    return interpolation.removesuffix("-opencv")


def _linear(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize bytes like OpenCV's HResizeLinear and VResizeLinear, with their rounding."""
    upper, lower, row_weights = _neighbours(pixels.shape[0], size[0])
    left, right, column_weights = _neighbours(pixels.shape[1], size[1])
    near, far = column_weights[:, None], _WEIGHT_UNIT - column_weights[:, None]

    def row(rows: NDArray[np.int64]) -> NDArray[np.int32]:
        chosen = pixels.take(rows, axis=0)
        return (chosen.take(left, axis=1) * far + chosen.take(right, axis=1) * near) >> 4

    above = (row(upper) * (_WEIGHT_UNIT - row_weights)[:, None, None]) >> 16
    below = (row(lower) * row_weights[:, None, None]) >> 16
    return ((above + below + 2) >> 2).astype(np.uint8)


def _neighbours(
    source: int, target: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Return the source pixels before and after each target pixel, and the weight of the latter."""
    scale = 1.0 / (target / source)
    position = ((np.arange(target) + 0.5) * scale - 0.5).astype(np.float32)
    before = np.floor(position)
    weight = np.rint((position - before) * np.float32(_WEIGHT_UNIT)).astype(np.int32)
    first = before.astype(np.int64)
    return first.clip(0, source - 1), (first + 1).clip(0, source - 1), weight
