"""The encoder's transforms: features to gains and sorted, scaled coefficients."""

import numpy as np

from scalekd.codecs._spatial import forward
from scalekd.codecs.options import Gain, Metric
from scalekd.shapes import FeatureShape

# Gains are powers of two in eighths: sixteenths save 0.001 bit a value (docs/LOG.md).
GAIN_STEPS = 8
# Gains and their inverses stay within float32's normal numbers.
MAX_OCTAVES = 120
# In the frequency view a token close to its view's mean counts as much as any, but following it
# down without end would cost the other coefficients of its view all their bits.
FREQUENCY_FLOOR = 0.25


def gain_logs(features: np.ndarray, shape: FeatureShape, metric: Metric, gain: Gain) -> np.ndarray:
    """Binary logarithm of what each token (or view) is divided by; ``-inf`` for zero tokens.

    The losses compare unit vectors, so an error counts relative to its token's length (in the
    frequency view: its distance from the view's mean). After division one step fits all tokens,
    and massive tokens cost no more than others.
    """
    if metric == "frequency":
        first = shape.num_prefix_tokens
        patches = features[:, first:]
        lengths = np.empty(features.shape[:2], np.float64)
        lengths[:, :first] = _lengths(features[:, :first])
        distances = _lengths(patches - patches.mean(axis=1, keepdims=True))
        typical = np.sqrt(np.square(distances).mean(axis=1, keepdims=True))
        lengths[:, first:] = np.maximum(distances, FREQUENCY_FLOOR * typical)
    else:
        lengths = _lengths(features)
    if gain == "view":
        lengths = np.sqrt(np.square(lengths).mean(axis=1, keepdims=True))
    with np.errstate(divide="ignore"):
        return np.asarray(np.log2(lengths))


def quantise_gains(logs: np.ndarray, reference: float) -> np.ndarray:
    """Stored gains, int16 ``(view, gain)``; a zero token gets the reference gain."""
    octaves = np.clip(np.where(np.isfinite(logs), logs, reference), -MAX_OCTAVES, MAX_OCTAVES)
    return np.asarray(np.rint((octaves - reference) * GAIN_STEPS).astype(np.int16))


def normalise(features: np.ndarray, gains: np.ndarray, reference: float) -> np.ndarray:
    """Divide by the stored gains; a new float32 array."""
    inverse = np.exp2(-(gains / GAIN_STEPS + reference))
    return np.asarray(features * inverse[..., None].astype(np.float32), np.float32)


def analyse(
    normalised: np.ndarray,
    mean: np.ndarray,
    bases: tuple[np.ndarray, ...],
    bands: np.ndarray,
    shape: FeatureShape,
) -> list[np.ndarray]:
    """Coefficients by band, each float32 ``(view, row of the band, component)``.

    Args:
        normalised: float32 ``(view, token, channel)``; overwritten.
        mean: float32 ``(token, channel)``.
        bases: float32 ``(component, channel)`` by band.
        bands: Band of each row.
        shape: Of the features.
    """
    normalised -= mean
    rows = forward(normalised, shape)
    views, channels = rows.shape[0], shape.num_channels
    result = []
    for band, basis in enumerate(bases):
        part = rows[:, bands == band]
        product = part.reshape(-1, channels) @ basis.T
        result.append(product.reshape(views, part.shape[1], len(basis)))
    return result


def coefficient_columns(
    order: np.ndarray, bands: np.ndarray, sizes: list[int], num_channels: int
) -> np.ndarray:
    """Where each sorted coefficient lies when the bands' coefficients are laid end to end.

    Args:
        order: ``row * num_channels + component``.
        bands: Band of each row.
        sizes: Components of each band's basis.
        num_channels: Of the features.

    Returns:
        int64 ``(coefficient,)``.
    """
    size_of_row = np.array(sizes, np.int64)[bands]
    by_band = np.argsort(bands, kind="stable")
    start = np.empty(len(bands), np.int64)
    start[by_band] = np.cumsum(size_of_row[by_band]) - size_of_row[by_band]
    row, component = np.divmod(order.astype(np.int64), num_channels)
    return np.asarray(start[row] + component)


def _lengths(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        squares = np.einsum("vtc,vtc->vt", values, values).astype(np.float64)
    if not np.isfinite(squares).all():  # magnitudes beyond 1e19: rare, so slow is fine
        squares = np.einsum("vtc,vtc->vt", values, values, dtype=np.float64)
    return np.asarray(np.sqrt(squares))
