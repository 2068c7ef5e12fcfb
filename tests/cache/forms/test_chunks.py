"""Moving the view axis of a chunk to the front."""

import numpy as np
import pytest

from scalekd.cache.forms.chunks import views_first


@pytest.mark.parametrize(
    ("shape", "view_axis"),
    [((5, 3), 0), ((3, 256), 1), ((64, 7), 1), ((200, 5, 2), 1), ((3, 50, 4, 2), 2)],
)
def test_the_view_axis_comes_first_in_contiguous_memory(
    shape: tuple[int, ...], view_axis: int
) -> None:
    rows = np.random.default_rng(0).integers(-9, 9, shape).astype(np.int16)
    moved = views_first(rows, view_axis)
    assert moved.flags.c_contiguous
    assert np.array_equal(moved, np.moveaxis(rows, view_axis, 0))
