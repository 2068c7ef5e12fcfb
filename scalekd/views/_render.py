"""Draw the pixels of a view, the first time and at every replay: one function, one path.

The crop is cut before it is resized, as timm and torchvision do: ``resize(box=...)`` would save a
copy but lets the filter see pixels outside the box, which changes the view's border.
"""

import math

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from scalekd.errors import DataError
from scalekd.views._operations import apply_operation
from scalekd.views._params import ERASE_UNIT, MAX_PIXELS, MAX_SIDE, EraseBox, ViewParams
from scalekd.views._random import noise_table, noise_words
from scalekd.views._resize import pillow_name, resize


def render(
    image: Image.Image, params: ViewParams, *, view_size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Draw a view.

    Args:
        image: The decoded source image, RGB; unchanged.
        params: The view, just drawn or read from a cache.
        view_size: Height and width in pixels. At the size the view was drawn for, the pixels are
            exactly those of the first time; at another, the same part of the picture is shown.
            Noise is then of the same distribution but not the same picture.

    Returns:
        uint8 array (height, width, 3), writable, not normalised.

    Raises:
        ValueError: ``image`` is not RGB or ``view_size`` is out of range.
        DataError: The crop box is not inside the image: this is not the image the view is of. Or
            a centre view would first be blown up to more pixels than an image may have.
    """
    if image.mode != "RGB":
        raise ValueError(f"views are drawn from RGB images, not {image.mode}; use decode_image")
    if not all(1 <= side <= MAX_SIDE for side in view_size):
        raise ValueError(f"a view's sides must be in 1..{MAX_SIDE}, not {view_size}")
    view = _center(image, params, view_size) if params.center else _crop(image, params, view_size)
    if params.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, argument in params.operations:
        view = apply_operation(
            view, name, argument, interpolation=pillow_name(params.interpolation), fill=params.fill
        )
    pixels = np.array(view)
    if params.erase is not None:
        _fill_with_noise(pixels, params.erase, params)
    return pixels


def _crop(image: Image.Image, params: ViewParams, view_size: tuple[int, int]) -> Image.Image:
    if params.crop is None:
        raise ValueError("a view has either a crop box or a centre fraction")
    top, left, height, width = params.crop
    if top + height > image.height or left + width > image.width:
        # Pillow would pad with black.
        raise DataError(
            f"a view of rows {top}..{top + height} and columns {left}..{left + width} is not of "
            f"this image, which has {image.height} x {image.width} px: the view was drawn on "
            "another image of that key; use the data set that the cache was made from"
        )
    if (height, width) != (image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    return resize(image, view_size, params.interpolation)


def _center(image: Image.Image, params: ViewParams, view_size: tuple[int, int]) -> Image.Image:
    """As timm's transforms_imagenet_eval: resize whole, then cut, rounding as it does."""
    fraction = params.center or 1.0
    if max(view_size) / fraction > MAX_SIDE:
        raise DataError(
            f"a centre view that keeps {fraction} of the side is cut from more than {MAX_SIDE:,} px"
        )
    rows, columns = (math.floor(side / fraction) for side in view_size)
    if rows == columns:
        short, long = sorted(image.size)
        long = int(rows * long / short)
        size = (long, rows) if image.height > image.width else (rows, long)
    else:
        ratio = min(image.height / rows, image.width / columns)
        size = (round(image.height / ratio), round(image.width / ratio))
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"a centre view of an image of {image.height:,} x {image.width:,} px is cut from"
            f" {size[0]:,} x {size[1]:,}, more than {MAX_PIXELS:,} pixels; leave such images out"
        )
    resized = resize(image, size, params.interpolation)
    top = round((resized.height - view_size[0]) / 2)
    left = round((resized.width - view_size[1]) / 2)
    return resized.crop((left, top, left + view_size[1], top + view_size[0]))


def _fill_with_noise(pixels: NDArray[np.uint8], box: EraseBox, params: ViewParams) -> None:
    rows, columns = pixels.shape[:2]
    top, height = _pixels(box.top, rows), max(1, _pixels(box.height, rows))
    left, width = _pixels(box.left, columns), max(1, _pixels(box.width, columns))
    region = pixels[top : top + height, left : left + width]  # a rounded box may reach past the end
    height, width = region.shape[:2]
    words = noise_words(params.noise_seed, 3 * height * width).reshape(3, height, width)
    for channel in range(3):
        table = noise_table(params.mean[channel], params.std[channel])
        region[..., channel] = table[words[channel]]


def _pixels(fraction: int, side: int) -> int:
    """A stored fraction of ``side``, rounded to pixels; the inverse of how it was drawn."""
    return (2 * fraction * side + ERASE_UNIT) // (2 * ERASE_UNIT)


def pixel_hash(pixels: NDArray[np.uint8]) -> int:
    """xxh3-64 of a view's bytes, row by row, RGB; before any normalisation.

    Args:
        pixels: uint8 (height, width, 3).
    """
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels are uint8, not {pixels.dtype}")
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data)


def mean_difference(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Mean absolute difference of two views' pixels, in steps of 1/255.

    Args:
        first: uint8 (height, width, 3).
        second: uint8 of the same shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"views of {first.shape} and {second.shape} cannot be compared")
    return float(np.abs(first.astype(np.int16) - second).mean())
