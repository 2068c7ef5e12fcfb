"""The transforms of the encoder, from features to gains and sorted, scaled coefficients."""

import numpy as np

from scalekd.codecs._spatial import forward
from scalekd.codecs.options import Gain, Metric
from scalekd.shapes import FeatureShape

# Gains are powers of two in steps of 1/8 octave: 1/16 saves 0.001 bit a value (docs/LOG.md).
GAIN_STEPS = 8
# Gains and their inverses stay within float32's normal numbers.
MAX_OCTAVES = 120
# Smallest gain of a token in the frequency view, as a fraction of its view's typical one. Without
# it, a token close to its view's mean would take most bits of the view.
FREQUENCY_FLOOR = 0.25


def gain_logs(features: np.ndarray, shape: FeatureShape, metric: Metric, gain: Gain) -> np.ndarray:
    """Return the binary logarithm of each token's (or view's) divisor; ``-inf`` for zero tokens.

    The losses compare unit vectors, so an error counts relative to its token's length (in the
    frequency view: its distance from the view's mean). After division one quantiser step suits all
    tokens, and tokens of large norm cost no more than others.
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
    """Round gains to their stored form, int16 ``(view, gain)``; zero tokens get the reference."""
    octaves = np.clip(np.where(np.isfinite(logs), logs, reference), -MAX_OCTAVES, MAX_OCTAVES)
    return np.asarray(np.rint((octaves - reference) * GAIN_STEPS).astype(np.int16))


def normalise(features: np.ndarray, gains: np.ndarray, reference: float) -> np.ndarray:
    """Divide features by the stored gains; return a new float32 array."""
    inverse = np.exp2(-(gains / GAIN_STEPS + reference))
    return np.asarray(features * inverse[..., None].astype(np.float32), np.float32)


def analyse(
    normalised: np.ndarray,
    mean: np.ndarray,
    bases: tuple[np.ndarray, ...],
    bands: np.ndarray,
    shape: FeatureShape,
) -> list[np.ndarray]:
    """Compute the coefficients of each band, float32 ``(view, row of the band, component)``.

    Args:
        normalised: Normalised features, float32 ``(view, token, channel)``; overwritten.
        mean: Mean of normalised features, float32 ``(token, channel)``.
        bases: Basis of each band, float32 ``(component, channel)``.
        bands: Band of each row.
        shape: Shape of the features.
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
    """Return the index of each sorted coefficient in the concatenation of all bands.

    Args:
        order: ``row * num_channels + component`` of each coefficient.
        bands: Band of each row.
        sizes: Number of components of each band's basis.
        num_channels: Number of channels of the features.

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
    if not np.isfinite(squares).all():  # magnitudes beyond 1e19 are rare
        squares = np.einsum("vtc,vtc->vt", values, values, dtype=np.float64)
    return np.asarray(np.sqrt(squares))
