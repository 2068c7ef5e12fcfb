"""Comparison of views' pixels: their hash, their difference, and the relevant versions."""

import platform
from importlib import metadata

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import features


def pixel_environment() -> dict[str, str]:
    """Return the versions that determine the pixels of a replayed view.

    Returns:
        Versions by name: ``pillow`` (resize, colour, geometry), ``libjpeg`` (name and version) and
        ``libwebp`` (lossy decoders), ``torchvision`` (for caches of version 0.2), ``numpy`` (raw
        random bits), ``python``, and ``machine``, the processor family: compilers may fuse
        multiply and add on some, which can move the last bit of a blend or a rotation.
        PNG and the other lossless formats decode to the same pixels in every version.
    """
    turbo = features.version("libjpeg_turbo")
    libjpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
    return {
        "pillow": metadata.version("pillow"),
        "libjpeg": libjpeg,
        "libwebp": features.version("webp") or "none",
        "torchvision": metadata.version("torchvision"),
        "numpy": metadata.version("numpy"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
    }


def pixel_hash(pixels: NDArray[np.uint8]) -> int:
    """Compute the xxh3-64 of a view's RGB bytes, row by row, before normalisation.

    Args:
        pixels: uint8 (height, width, 3).
    """
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels are uint8, not {pixels.dtype}")
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data)


def mean_difference(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Compute the mean absolute difference of two views' pixels, in steps of 1/255.

    Args:
        first: uint8 (height, width, 3).
        second: uint8 of the same shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"views of {first.shape} and {second.shape} cannot be compared")
    return float(np.abs(first.astype(np.int16) - second).mean())
