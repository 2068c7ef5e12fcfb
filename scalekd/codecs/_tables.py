"""The tables of a fitted transform codec, and their checks when they are read from a file."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scalekd.codecs import _trellis
from scalekd.codecs._spatial import radial_bands
from scalekd.codecs.base import JsonDict
from scalekd.codecs.options import GAINS, METRICS, Gain, Metric, TransformOptions
from scalekd.errors import CacheCorrupt, UsageError
from scalekd.shapes import FeatureShape

# Coefficients of one group share the fine tuning of their quantiser. A group is one slab of trellis
# paths, or this many scalar-coded coefficients.
SCALAR_GROUP = 128
SCALE, PULL, SHIFT, WEIGHT, THRESHOLD = GROUP_COLUMNS = range(5)
"""Columns of the tuning of a group; see :class:`TransformTables`."""


@dataclass(frozen=True)
class TransformTables:
    """The result of fitting a transform codec to calibration views.

    A coefficient is a row (prefix token or spatial frequency) and a component of its band's basis.
    Stored coefficients are sorted by falling standard deviation; the first ``num_trellis`` are
    trellis-coded, the others are scalar-coded, and dropped coefficients are zero.

    Attributes:
        options: Target error that the step was fitted to.
        gain: Whether each token or the whole view is divided by its length.
        num_bands: Requested number of radial bands; small grids use fewer.
        step: Fine quantiser step, in units of normalised features.
        reference: Binary logarithm of the gain whose stored value is 0.
        num_trellis: Number of trellis-coded coefficients, a multiple of ``_trellis.STEPS``.
        mean: Mean of normalised features, float32 ``(token, channel)``.
        bases: Basis of each band, float16 ``(component, channel)``, sorted by falling energy.
        order: ``row * channels + component`` of each coefficient, int32 ``(coefficient,)``.
        groups: Tuning of each group, float32 ``(group, 5)``: scale, pull, shift, weight and
            threshold, in units of the step. Decoding maps a point ``y`` to
            ``scale * y + pull * clamp(y, -1/2, 1/2)``; encoding first moves a magnitude ``a`` to
            ``(a - shift) / weight``; scalar-coded magnitudes up to ``threshold`` become zero.
    """

    options: TransformOptions
    gain: Gain
    num_bands: int
    step: float
    reference: float
    num_trellis: int
    mean: np.ndarray
    bases: tuple[np.ndarray, ...]
    order: np.ndarray
    groups: np.ndarray

    @property
    def num_coefficients(self) -> int:
        return len(self.order)

    def num_gains(self, shape: FeatureShape) -> int:
        """Return the number of stored gains of a view."""
        return shape.num_tokens if self.gain == "token" else 1

    def group_of(self) -> np.ndarray:
        """Return the group of each coefficient, int64 ``(coefficient,)``."""
        return coefficient_groups(self.num_coefficients, self.num_trellis)

    def to_config(self) -> JsonDict:
        return {
            "error": self.options.error,
            "metric": self.options.metric,
            "gain": self.gain,
            "num_bands": self.num_bands,
            "step": self.step,
            "reference": self.reference,
            "num_trellis": self.num_trellis,
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        bases = {f"basis_{band}": basis for band, basis in enumerate(self.bases)}
        return {"mean": self.mean, "order": self.order, "groups": self.groups, **bases}


def coefficient_groups(num_coefficients: int, num_trellis: int) -> np.ndarray:
    """Return group numbers: trellis slabs first, then runs of ``SCALAR_GROUP`` coefficients."""
    slab = max(num_trellis // _trellis.STEPS, 1)
    trellis = np.arange(num_trellis) // slab
    first = _trellis.STEPS if num_trellis else 0
    return np.concatenate(
        [trellis, first + np.arange(num_coefficients - num_trellis) // SCALAR_GROUP]
    )


def tables_from(
    config: JsonDict, arrays: Mapping[str, np.ndarray], shape: FeatureShape
) -> TransformTables:
    """Build tables from a configuration, whose keys have been checked, and arrays.

    Raises:
        CacheCorrupt: A value is out of range, or an array is missing, unexpected, not finite, of
            another type or shape, or has indices out of range.
    """
    num_bands = _integer(config, "num_bands", 1, 1024)
    num_trellis = _integer(config, "num_trellis", 0, shape.num_tokens * shape.num_channels)
    step, reference = _real(config, "step"), _real(config, "reference")
    if step <= 0 or abs(reference) > 200 or num_trellis % _trellis.STEPS:
        raise CacheCorrupt(
            f"transform codec: {step=}, {reference=}, {num_trellis=} are out of range"
        )
    metric: Metric = config["metric"]
    gain: Gain = config["gain"]
    if metric not in METRICS or gain not in GAINS:
        raise CacheCorrupt(f"transform codec: unknown {metric=} or {gain=}")
    try:
        options = TransformOptions(_real(config, "error"), metric)
    except UsageError as error:
        raise CacheCorrupt(str(error)) from error
    bands = radial_bands(shape, num_bands)
    names = [f"basis_{band}" for band in range(int(bands.max()) + 1)]
    expected = {"mean", "order", "groups", *names}
    if set(arrays) != expected:
        raise CacheCorrupt(
            f"transform codec: tables {sorted(arrays)} found, {sorted(expected)} expected"
        )
    mean = _array(arrays, "mean", np.float32, (shape.num_tokens, shape.num_channels))
    bases = tuple(_array(arrays, name, np.float16, (None, shape.num_channels)) for name in names)
    if any(len(basis) > shape.num_channels for basis in bases):
        raise CacheCorrupt("transform codec: a basis has more components than there are channels")
    order = _array(arrays, "order", np.int32, (None,))
    if not 1 <= len(order) <= shape.num_tokens * shape.num_channels or num_trellis > len(order):
        raise CacheCorrupt(f"transform codec: {len(order)} coefficients, {num_trellis} by trellis")
    count = int(coefficient_groups(len(order), num_trellis)[-1]) + 1
    groups = _array(arrays, "groups", np.float32, (count, len(GROUP_COLUMNS)))
    row, component = np.divmod(order, shape.num_channels)
    if order.min() < 0 or row.max() >= shape.num_tokens or len(np.unique(order)) != len(order):
        raise CacheCorrupt("transform codec: the coefficient order is not valid")
    if (component >= np.array([len(basis) for basis in bases])[bands[row]]).any():
        raise CacheCorrupt("transform codec: a coefficient lies outside its band's basis")
    if (groups[:, WEIGHT] < 1).any():
        raise CacheCorrupt("transform codec: a weight is below 1")
    return TransformTables(
        options, gain, num_bands, step, reference, num_trellis, mean, bases, order, groups
    )


def _integer(config: JsonDict, key: str, low: int, high: int) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CacheCorrupt(f"transform codec: {key}={value!r} is not an integer in {low}…{high}")
    return value


def _real(config: JsonDict, key: str) -> float:
    value = config[key]
    # Integers in JSON have any length; a float can represent those below 2**1024.
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) <= sys.float_info.max
    ):
        raise CacheCorrupt(f"transform codec: {key}={str(value)[:40]} is not a number")
    return float(value)


def _array(
    arrays: Mapping[str, np.ndarray], name: str, dtype: type, shape: tuple[int | None, ...]
) -> np.ndarray:
    array = arrays[name]
    fits = array.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise CacheCorrupt(
            f"transform codec: table {name!r} is {array.dtype}{array.shape}, expected "
            f"{np.dtype(dtype)}{shape}"
        )
    if not np.isfinite(array).all():
        raise CacheCorrupt(f"transform codec: table {name!r} contains NaN or infinity")
    return array
