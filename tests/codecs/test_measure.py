import numpy as np
import pytest

from scalekd.codecs import measure_errors, view_errors
from scalekd.shapes import FeatureShape


def test_errors_equal_numbers_worked_by_hand() -> None:
    shape = FeatureShape((1, 2), 2)
    before = np.array([[[3.0, 0.0], [0.0, 4.0]]])
    after = np.array([[[0.0, 3.0], [0.0, 8.0]]])
    errors = measure_errors(before, after, shape)
    # raw: (9 + 9 + 0 + 16) / (9 + 16). spatial: tokens turned by 90 and 0 degrees: (2 + 0) / 2.
    assert errors.raw.mean == pytest.approx(34 / 25)
    assert errors.spatial.mean == pytest.approx(1.0)
    # frequency: before (1.5, -2), (-1.5, 2); after (0, -2.5), (0, 2.5): cosine 2 / 2.5.
    assert errors.frequency.mean == pytest.approx(2 - 2 * 0.8, rel=1e-6)


def test_prefix_tokens_count_in_raw_only() -> None:
    shape = FeatureShape((1, 2), 2, 1)
    before = np.array([[[1.0, 1.0], [3.0, 0.0], [0.0, 4.0]]])
    after = before.copy()
    after[0, 0] = -1
    errors = measure_errors(before, after, shape)
    assert errors.raw.mean == pytest.approx(8 / 27)
    assert errors.spatial.mean == errors.frequency.mean == 0


def test_constant_and_zero_maps_have_no_direction() -> None:
    shape = FeatureShape((2, 2), 3)
    before = np.stack([np.ones((4, 3)), np.zeros((4, 3))]).astype(np.float32)
    after = before * np.float32(1 + 1e-7)
    errors = view_errors(before, after, shape)
    assert errors["frequency"].tolist() == [0, 0]
    assert errors["raw"].max() < 1e-12
    assert errors["spatial"].max() < 1e-12


def test_the_summary_is_over_views() -> None:
    shape = FeatureShape((1, 1), 1)
    before = np.ones((100, 1, 1))
    after = before.copy()
    after[:4] = 3  # squared error 4 of energy 1 in four views of a hundred
    errors = measure_errors(before, after, shape)
    assert errors.raw.mean == pytest.approx(0.16)
    assert errors.raw.max == 4
    assert errors.raw.p95 == 0
    assert errors.num_views == 100


def test_huge_float32_features_do_not_overflow() -> None:
    shape = FeatureShape((1, 2), 2)
    before = np.full((1, 2, 2), 1e30, np.float32)
    errors = measure_errors(before, before * np.float32(1.1), shape)
    assert errors.raw.mean == pytest.approx(0.01, rel=1e-3)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="decoded"):
        view_errors(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)), FeatureShape((1, 2), 3))
