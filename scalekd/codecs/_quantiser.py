"""The encoder's quantisers and their fine tuning.

Rate-distortion optimisation without a search over rates: in each group of coefficients of one
scale the cost in bits of a point ``y`` is close to ``a + b|y| + c y**2``. Squared distance plus
that price is, up to a constant, ``(1 + price * c)`` times the squared distance from the value
moved towards zero: ``(|v| - price * b / 2) / (1 + price * c)``. So moving the values first makes
the plain nearest-point search the rate-aware one.
"""

import numpy as np

from scalekd.codecs import _trellis
from scalekd.codecs._tables import GROUP_COLUMNS, PULL, SCALE, SHIFT, THRESHOLD, WEIGHT

# Squared fine steps that a bit is worth. At high rate the slope of the curve is 2 ln 2 times the
# distortion, 0.36; a little less was best on real features (docs/LOG.md).
_BIT_PRICE = 0.30
# Counts added to each group's histogram, and weight of undistorted points in units of views.
_PRIOR = 4.0


def quantise(
    values: np.ndarray, groups: np.ndarray, group_of: np.ndarray, num_trellis: int
) -> np.ndarray:
    """Quantise coefficients to indices.

    Args:
        values: float32 ``(coefficient, view)`` in units of the fine step.
        groups: Tuning of each group; see :class:`~scalekd.codecs._tables.TransformTables`.
        group_of: Group of each coefficient.
        num_trellis: Number of trellis-coded coefficients, which come first.

    Returns:
        Indices, int32 ``(coefficient, view)``.
    """
    columns = (SHIFT, WEIGHT, THRESHOLD)
    shift, weight, threshold = (groups[group_of, column][:, None] for column in columns)
    magnitude = np.abs(values)
    moved = np.maximum(magnitude - shift, 0)
    indices = np.empty(values.shape, np.int32)
    if num_trellis:
        tail = slice(num_trellis)
        targets = np.copysign(moved[tail] / weight[tail], values[tail])
        indices[tail] = _trellis.encode(targets, groups[: _trellis.STEPS, WEIGHT])
    rest = slice(num_trellis, None)
    levels = np.maximum(np.rint(moved[rest] * 0.5), 1)
    levels[magnitude[rest] <= threshold[rest]] = 0
    indices[rest] = np.copysign(levels, values[rest])
    return indices


def points(indices: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Return reproduction points, float32, in units of the fine step.

    Args:
        indices: Indices ``(coefficient, view)``.
        choices: Quantiser (0 or 1) of each trellis-coded coefficient; these come first.
    """
    result = indices.astype(np.float32) * 2
    trellis = result[: len(choices)]
    trellis += 0.5
    trellis *= 1 - 2 * choices.astype(np.float32)
    return result


def initial_groups(sigmas: np.ndarray, group_of: np.ndarray, num_trellis: int) -> np.ndarray:
    """Return the tuning for Gaussian coefficients, where ``c`` is ``1 / (2 ln 2 sigma**2)``.

    Args:
        sigmas: Standard deviation of each coefficient, in units of the step.
        group_of: Group of each coefficient.
        num_trellis: Number of trellis-coded coefficients, which come first.
    """
    count = int(group_of[-1]) + 1
    variance = np.bincount(group_of, weights=np.square(sigmas)) / np.bincount(group_of)
    groups = np.zeros((count, len(GROUP_COLUMNS)), np.float32)
    groups[:, [SCALE, WEIGHT]] = 1
    if num_trellis:
        slabs = slice(_trellis.STEPS)
        groups[slabs, WEIGHT] += _BIT_PRICE / (2 * np.log(2) * np.maximum(variance[slabs], 0.1))
    groups[:, THRESHOLD] = 1.3
    return groups


def tune_rates(
    groups: np.ndarray, reproduced: np.ndarray, group_of: np.ndarray, num_trellis: int
) -> np.ndarray:
    """Refit ``shift``, ``weight`` and ``threshold`` to the counts of the points."""
    tuned = groups.copy()
    first = _trellis.STEPS if num_trellis else 0
    for group, rows in _runs(group_of):
        magnitude = np.abs(reproduced[rows])
        if group < first:
            counts = np.bincount(magnitude.astype(np.int32).reshape(-1))
            linear, quadratic = _fit_bits(counts + _PRIOR / len(counts))
            tuned[group, SHIFT] = _BIT_PRICE * linear / 2
            tuned[group, WEIGHT] = 1 + _BIT_PRICE * quadratic
        else:
            counts = np.bincount((magnitude * 0.5).astype(np.int32).reshape(-1), minlength=3)
            frequency = (counts + _PRIOR * np.array([1, 0.1, 0.01] + [0] * (len(counts) - 3)))[:3]
            bits = -np.log2(frequency / frequency.sum())
            scale, pull = groups[group, [SCALE, PULL]]
            one = max(2 * scale + 0.5 * pull, 1.0)
            two = max(4 * scale + 0.5 * pull, one + 1.0)
            # Nonzero levels have a sign bit; bounds are midpoints moved by the bit price.
            bound = one / 2 + _BIT_PRICE * max(bits[1] + 1 - bits[0], 0) / (2 * one)
            next_bound = (one + two) / 2 + _BIT_PRICE * max(bits[2] - bits[1], 0) / (
                2 * (two - one)
            )
            tuned[group, THRESHOLD] = np.clip(bound, 1, 4)
            tuned[group, SHIFT] = np.clip(next_bound - 3, 0, 1.5)
    return tuned


def tune_points(
    groups: np.ndarray, reproduced: np.ndarray, values: np.ndarray, group_of: np.ndarray
) -> np.ndarray:
    """Refit ``scale`` and ``pull`` so that points are the centroids of their values."""
    tuned = groups.copy()
    for group, rows in _runs(group_of):
        point, value = reproduced[rows].astype(np.float64), values[rows]
        near = np.clip(point, -0.5, 0.5)
        cross = float((point * near).sum())
        normal = np.array(
            [[np.square(point).sum() + _PRIOR, cross], [cross, np.square(near).sum()]]
        )
        normal[1, 1] += _PRIOR
        right = np.array([float((point * value).sum()) + _PRIOR, float((near * value).sum())])
        tuned[group, [SCALE, PULL]] = np.linalg.solve(normal, right)
    return tuned


def _fit_bits(counts: np.ndarray) -> tuple[float, float]:
    """Fit non-negative ``b`` and ``c`` of ``a + b|y| + c y**2``, weighted by counts."""
    magnitude = np.arange(len(counts)) + 0.5
    bits = -np.log2(counts / counts.sum())
    root = np.sqrt(counts)

    def fit(*terms: np.ndarray) -> np.ndarray:
        design = np.stack([np.ones_like(magnitude), *terms], axis=1) * root[:, None]
        return np.asarray(np.linalg.lstsq(design, bits * root, rcond=None)[0])

    if len(counts) < 2:
        return 0.0, 0.0
    if len(counts) > 2:
        _, linear, quadratic = fit(magnitude, np.square(magnitude))
        if linear >= 0 and quadratic >= 0:
            return float(linear), float(quadratic)
        if linear < 0:
            return 0.0, max(float(fit(np.square(magnitude))[1]), 0.0)
    return max(float(fit(magnitude)[1]), 0.0), 0.0


def _runs(group_of: np.ndarray) -> list[tuple[int, slice]]:
    """Return the slice of each group; ``group_of`` is sorted."""
    starts = np.flatnonzero(np.r_[True, np.diff(group_of) > 0])
    return [
        (int(group_of[start]), slice(int(start), int(end)))
        for start, end in zip(starts, np.r_[starts[1:], len(group_of)], strict=True)
    ]
