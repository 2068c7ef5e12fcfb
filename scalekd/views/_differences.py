"""Pixels as differences between neighbours, which a general compressor makes small.

Green is subtracted from red and blue, then from each value its left neighbour, then from that the
one above, all modulo 256. 224 px views of photographs have 76 kB with zstd at level 1, 90 kB
without the subtraction of green; lossless WebP has 66 kB and takes seven times as long to decode
(docs/LOG.md). Two cumulative sums and one addition restore the pixels on any device.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Rows = np.ndarray[Any, np.dtype[np.uint8]]


def pixel_differences(pixels: Rows) -> Rows:
    """Compute the differences of views.

    Args:
        pixels: uint8 (view, 3, height, width).

    Returns:
        uint8 of the same shape.
    """
    planes = np.array(pixels, order="C")
    planes[:, ::2] -= planes[:, 1:2]
    left = planes.copy()
    left[..., 1:] -= planes[..., :-1]
    up = left.copy()
    up[:, :, 1:] -= left[:, :, :-1]
    return up


def undo_differences(differences: "Tensor") -> "Tensor":
    """Invert :func:`pixel_differences` on the tensor's device.

    Args:
        differences: uint8 (view, 3, height, width).

    Returns:
        uint8 of the same shape.
    """
    import torch

    planes = differences.cumsum(3, dtype=torch.uint8).cumsum_(2)
    planes[:, ::2] += planes[:, 1:2]
    return planes
