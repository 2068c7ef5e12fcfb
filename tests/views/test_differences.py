"""Differences between neighbouring pixels are undone exactly."""

import numpy as np
import torch

from scalekd.views import pixel_differences, undo_differences


def test_differences_worked_by_hand() -> None:
    red, green, blue = [[10, 12], [9, 0]], [[4, 250], [1, 1]], [[0, 0], [255, 3]]
    found = pixel_differences(np.array([[red, green, blue]], np.uint8))[0]
    # Red minus green: [[6, 18], [8, 255]]; minus left: [[6, 12], [8, 247]]; minus above.
    assert found[0].tolist() == [[6, 12], [2, 235]]
    assert found[1].tolist() == [[4, 246], [253, 10]]
    # Blue minus green: [[252, 6], [254, 2]]; minus left: [[252, 10], [254, 4]]; minus above.
    assert found[2].tolist() == [[252, 10], [2, 250]]


def test_every_pixel_is_restored() -> None:
    random = np.random.default_rng(0)
    for shape in ((3, 3, 1, 1), (2, 3, 1, 7), (2, 3, 9, 1), (4, 3, 33, 20), (0, 3, 4, 4)):
        views = random.integers(0, 256, shape, dtype=np.uint8)
        for pixels in (views, np.zeros_like(views), np.full_like(views, 255)):
            before = pixels.copy()
            restored = undo_differences(torch.from_numpy(pixel_differences(pixels)))
            assert restored.dtype == torch.uint8
            np.testing.assert_array_equal(restored.numpy(), pixels)
            np.testing.assert_array_equal(pixels, before)


def test_pixels_may_lie_row_by_row_in_memory() -> None:
    views = np.random.default_rng(1).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    planes = np.ascontiguousarray(views.transpose(0, 3, 1, 2))
    found = pixel_differences(views.transpose(0, 3, 1, 2))
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, pixel_differences(planes))
