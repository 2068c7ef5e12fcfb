"""Statistics of calibration views, in one pass.

Four views in five contribute to the mean and the second moments, and are not kept. Every fifth is
held out for what is fitted afterwards.
"""

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from scalekd.codecs import _analysis
from scalekd.codecs._spatial import forward, radial_bands
from scalekd.codecs.options import GAINS, Gain, TransformOptions
from scalekd.errors import DataError, UsageError
from scalekd.shapes import FeatureShape

_HOLD_OUT_EVERY = 5
_HOLD_OUT_VIEWS = 640
_HOLD_OUT_BYTES = 1 << 30
# Radial bands: 8 instead of 4 saved 0.008 bit a value; 16 another 0.001 for twice the tables
# (docs/LOG.md). Few calibration views allow only fewer bases.
_NUM_BANDS = 8
_NUM_BANDS_SHORT = 4
_SHORT_TOKENS_PER_CHANNEL = 50
# Weight, in views, of the mean over all patch tokens in the mean of each position.
_MEAN_PRIOR = 8.0


@dataclass
class Statistics:
    """Sums over calibration views, with the second moments of each band."""

    shape: FeatureShape
    gain: Gain
    num_views: int
    mean: np.ndarray
    moments: np.ndarray
    held: np.ndarray
    reference: float
    bands: np.ndarray
    num_bands: int


def accumulate(
    shape: FeatureShape,
    calibration: Iterable[np.ndarray],
    options: TransformOptions,
    pool: Executor,
) -> Statistics:
    """Read calibration views once; see :func:`scalekd.codecs._fit.fit` for arguments and errors.

    Args:
        shape: Shape of one view's features.
        calibration: Blocks of features ``(view, token, channel)``.
        options: Target error.
        pool: Threads that compute the second moments of bands.
    """
    expected = options.num_calibration_views(shape)
    num_bands = _choose_bands(shape, expected)
    bands = radial_bands(shape, num_bands)
    gain: Gain | None = None
    count_bands = int(bands.max()) + 1
    tokens, channels = shape.num_tokens, shape.num_channels
    total = np.zeros((tokens, channels))
    moments = np.zeros((count_bands, channels, channels))
    held: list[np.ndarray] = []
    limit = min(_HOLD_OUT_VIEWS, max(8, _HOLD_OUT_BYTES // (4 * tokens * channels)))
    seen = used = kept = 0
    reference: float | None = None
    for block in calibration:
        _check(block, shape, seen)
        for start in range(0, len(block), 256):
            part = np.asarray(block[start : start + 256], np.float32)
            index = np.arange(seen, seen + len(part))
            seen += len(part)
            hold = index % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1
            hold &= kept + np.cumsum(hold) <= limit
            kept += int(hold.sum())
            held.append(part[hold])
            part = part[~hold]
            if len(part) == 0:
                continue
            used += len(part)
            gain = gain or _choose_gain(part, shape, options)
            logs = _analysis.gain_logs(part, shape, options.metric, gain)
            if reference is None:
                finite = logs[np.isfinite(logs)]
                reference = float(np.round(np.median(finite), 3)) if finite.size else 0.0
            gains = _analysis.quantise_gains(logs, reference)
            normalised = _analysis.normalise(part, gains, reference)
            total += normalised.sum(axis=0, dtype=np.float64)
            rows = forward(normalised, shape)
            product = partial(_second_moment, rows, bands)
            for band, moment in enumerate(pool.map(product, range(count_bands))):
                moments[band] += moment
    if reference is None or gain is None:
        raise UsageError("the transform codec is fitted on features, and got no view")
    if kept == 0:  # fewer than five views: use them for both
        held = [np.asarray(part)]
    own = total / used
    mean = own.copy()
    first = shape.num_prefix_tokens
    mean[first:] += (own[first:].mean(axis=0) - own[first:]) * (_MEAN_PRIOR / (used + _MEAN_PRIOR))
    # Moments about ``mean`` from moments about zero; ``own`` is the mean of the views.
    seen_rows = forward(own.astype(np.float32)[None], shape)[0].astype(np.float64)
    rows = forward(mean.astype(np.float32)[None], shape)[0].astype(np.float64)
    for band in range(count_bands):
        known, centre = seen_rows[bands == band], rows[bands == band]
        cross = known.T @ centre
        moments[band] -= used * (cross + cross.T - centre.T @ centre)
    return Statistics(
        shape,
        gain,
        used,
        mean.astype(np.float32),
        moments,
        np.concatenate(held),
        reference,
        bands,
        num_bands,
    )


def _second_moment(rows: np.ndarray, bands: np.ndarray, band: int) -> np.ndarray:
    flat = rows[:, bands == band].reshape(-1, rows.shape[-1])
    return np.asarray(flat.T @ flat)


def _check(block: np.ndarray, shape: FeatureShape, seen: int) -> None:
    if block.ndim != 3 or block.shape[1:] != (shape.num_tokens, shape.num_channels):
        raise UsageError(f"calibration features of shape {block.shape} do not fit {shape}")
    bad = np.argwhere(~np.isfinite(block))
    if len(bad):
        view, token, _ = (int(i) for i in bad[0])
        raise DataError(f"calibration view {seen + view} contains NaN or infinity at token {token}")


def _choose_bands(shape: FeatureShape, num_views: int) -> int:
    enough = shape.num_patch_tokens * num_views >= _SHORT_TOKENS_PER_CHANNEL * shape.num_channels
    return _NUM_BANDS if enough else _NUM_BANDS_SHORT


def _choose_gain(views: np.ndarray, shape: FeatureShape, options: TransformOptions) -> Gain:
    """Choose token or view gains by the rate-distortion bound of the first views.

    The loss measures relative errors of tokens, which token gains equalise. If the lengths of
    tokens differ little, however, dividing by them weakens the correlation between tokens.
    """
    if options.metric == "raw":
        return "view"
    energy = np.exp2(2 * _analysis.gain_logs(views, shape, options.metric, "token"))
    if not energy.max() > 0:
        return "view"
    energy = np.maximum(energy[:, shape.num_prefix_tokens :], 1e-12 * energy.max() + 1e-300)
    rates = {}
    for gain in GAINS:
        logs = _analysis.gain_logs(views, shape, options.metric, gain)
        gains = _analysis.quantise_gains(logs, 0.0)
        normalised = _analysis.normalise(views, gains, 0.0)
        normalised -= normalised.mean(axis=0)
        rows = forward(normalised, shape)
        flat = rows.reshape(-1, shape.num_channels)
        _, vectors = np.linalg.eigh((flat.T @ flat).astype(np.float64))
        variances = np.square(rows @ vectors.astype(np.float32)).mean(axis=0, dtype=np.float64)
        # White noise of this variance per value meets the target on average.
        weight = np.exp2(2 * logs) if gain == "view" else energy
        level = options.error / (shape.num_channels * float((weight / energy).mean()))
        rate = 0.5 * np.log2(np.maximum(variances / level, 1)).sum()
        # A token gain costs about 3 bits.
        rates[gain] = float(rate) + (3.0 * shape.num_tokens if gain == "token" else 0.0)
    return min(GAINS, key=lambda gain: rates[gain])
