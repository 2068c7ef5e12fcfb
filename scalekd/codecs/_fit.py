"""Fitting of the transform codec: statistics in one pass, then the step by bisection.

Four views in five contribute to the mean and the bases, and are not kept. Every fifth is held out,
and the step and the tuning of the quantisers are fitted to those: on views that contributed to the
bases, the smallest components look smaller than they are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from scalekd.codecs import _analysis, _quantiser, _trellis
from scalekd.codecs._spatial import forward, radial_bands
from scalekd.codecs._tables import TransformTables, coefficient_groups
from scalekd.codecs.measure import view_errors
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
# Weight of the covariance of all bands in that of one band: tokens per channel.
_POOLING = 0.5
# Weight, in views, of the mean over all patch tokens in the mean of each position.
_MEAN_PRIOR = 8.0
# Weight, in views, of a component's variance over its band in the variance of each row.
_VARIANCE_PRIOR = 8.0
# Standard deviations in fine steps. From the first on, the trellis is better than a dead-zone
# quantiser; below the second a coefficient is almost always zero and is dropped. Both optima are
# flat: docs/LOG.md.
_TRELLIS_SIGMA = 0.65
_DROP_SIGMA = 0.25
_TOLERANCE = 0.003  # relative difference from the target error, on the held-out views
_MAX_ITERATIONS = 24

Decode = Callable[[TransformTables, Mapping[str, np.ndarray]], np.ndarray]


@dataclass
class _Statistics:
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


def fit(
    shape: FeatureShape,
    calibration: Iterable[np.ndarray],
    options: TransformOptions,
    decode: Decode,
) -> TransformTables:
    """Fit the tables of a transform codec.

    Args:
        shape: Shape of one view's features.
        calibration: Blocks of features ``(view, token, channel)``, read once and in order.
        options: Target error.
        decode: Function that decodes planes with given tables.

    Raises:
        UsageError: There are no views, or their shape differs.
        DataError: A view contains NaN or infinity.
    """
    statistics = _accumulate(shape, calibration, options)
    bases = _bases(statistics)
    held = statistics.held
    logs = _analysis.gain_logs(held, shape, options.metric, statistics.gain)
    gains = _analysis.quantise_gains(logs, statistics.reference)
    values = _coefficients(statistics, gains, bases, shape)
    sigmas = _sigmas(values, statistics, bases)
    order = np.argsort(-sigmas, kind="stable")
    search = _Search(statistics, options, bases, values, sigmas, order, gains, decode)
    return search.run()


def _accumulate(
    shape: FeatureShape,
    calibration: Iterable[np.ndarray],
    options: TransformOptions,
) -> _Statistics:
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
            for band in range(count_bands):
                flat = rows[:, bands == band].reshape(-1, channels)
                moments[band] += flat.T @ flat
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
    return _Statistics(
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


def _bases(statistics: _Statistics) -> tuple[np.ndarray, ...]:
    """Return the eigenvectors of each band, float16 ``(component, channel)``, by falling energy."""
    shape, bands = statistics.shape, statistics.bands
    is_prefix = np.zeros(int(bands.max()) + 1, bool)
    is_prefix[bands[: shape.num_prefix_tokens]] = True
    counts = np.bincount(bands) * float(statistics.num_views)
    bases = []
    for band, moment in enumerate(statistics.moments):
        family = is_prefix == is_prefix[band]
        pool = statistics.moments[family].sum(axis=0) / counts[family].sum()
        # The pooled covariance is scaled to the energy of the band.
        level = np.trace(moment) / max(counts[band] * np.trace(pool), 1e-300)
        covariance = moment + _POOLING * shape.num_channels * level * pool
        _, vectors = np.linalg.eigh(covariance)
        vectors = vectors[:, ::-1]
        # Eigenvectors are defined up to a sign: make the largest entry positive.
        largest = np.abs(vectors).argmax(axis=0)
        vectors = vectors * np.where(vectors[largest, np.arange(len(largest))] < 0, -1, 1)
        bases.append(np.ascontiguousarray(vectors.T).astype(np.float16))
    return tuple(bases)


def _coefficients(
    statistics: _Statistics, gains: np.ndarray, bases: tuple[np.ndarray, ...], shape: FeatureShape
) -> np.ndarray:
    """Return the coefficients of the held-out views: ``(row * channels + component, view)``."""
    held, bands = statistics.held, statistics.bands
    result = np.empty((shape.num_tokens, shape.num_channels, len(held)), np.float32)
    single = tuple(basis.astype(np.float32) for basis in bases)
    for start in range(0, len(held), 64):
        part = slice(start, start + 64)
        normalised = _analysis.normalise(held[part], gains[part], statistics.reference)
        for band, values in enumerate(
            _analysis.analyse(normalised, statistics.mean, single, bands, shape)
        ):
            result[bands == band, :, part] = values.transpose(1, 2, 0)
    return result.reshape(-1, len(held))


def _sigmas(
    values: np.ndarray, statistics: _Statistics, bases: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Return the standard deviation of each coefficient, shrunk to its band's average."""
    tokens, channels = statistics.shape.num_tokens, statistics.shape.num_channels
    num_views = values.shape[1]
    own = np.einsum("cv,cv->c", values, values, dtype=np.float64).reshape(tokens, channels)
    own /= num_views
    for band in range(len(bases)):
        rows = statistics.bands == band
        average = own[rows].mean(axis=0)
        own[rows] = (own[rows] * num_views + average * _VARIANCE_PRIOR) / (
            num_views + _VARIANCE_PRIOR
        )
    return np.asarray(np.sqrt(own).reshape(-1))


@dataclass
class _Search:
    """Bisection on the step; the quantisers are tuned and the error is measured at each step."""

    statistics: _Statistics
    options: TransformOptions
    bases: tuple[np.ndarray, ...]
    values: np.ndarray
    sigmas: np.ndarray
    order: np.ndarray
    gains: np.ndarray
    decode: Decode

    def run(self) -> TransformTables:
        target = self.options.error
        # Start near the target, at the step whose white noise would have about this error.
        step = float(np.sqrt(target / (0.27 * self.statistics.shape.num_channels)))
        low: tuple[float, float] | None = None
        high: tuple[float, float] | None = None
        best: tuple[float, TransformTables] | None = None
        for _ in range(_MAX_ITERATIONS):
            tables = self._tune(step)
            error = self._measure(tables)
            miss = abs(np.log(max(error, 1e-30) / target))
            if best is None or miss < best[0]:
                best = (miss, tables)
            if miss <= _TOLERANCE or not 1e-7 < step < 1e3:
                break
            if error < target:
                low = (np.log(step), np.log(max(error, 1e-30) / target))
            else:
                high = (np.log(step), np.log(error / target))
            if low and high:
                fraction = np.clip(-low[1] / (high[1] - low[1]), 0.1, 0.9)
                step = float(np.exp(low[0] + fraction * (high[0] - low[0])))
                if high[0] - low[0] < 1e-5:
                    break
            else:
                step *= float(np.clip((target / max(error, 1e-30)) ** 0.6, 0.2, 5.0))
        if best is None:  # cannot happen: the loop runs at least once
            raise UsageError("the transform codec's search made no trial")
        return best[1]

    def _tune(self, step: float) -> TransformTables:
        scaled = self.sigmas[self.order] / step
        # At least one coefficient, so that there is an array to store.
        count = max(int((scaled >= _DROP_SIGMA).sum()), 1)
        trellis = int((scaled >= _TRELLIS_SIGMA).sum()) // _trellis.STEPS * _trellis.STEPS
        order = self.order[:count]
        group_of = coefficient_groups(count, trellis)
        groups = _quantiser.initial_groups(scaled[:count], group_of, trellis)
        values = self.values[order] * np.float32(1 / step)
        for _ in range(2):
            points = self._points(values, groups, group_of, trellis)
            groups = _quantiser.tune_points(groups, points, values, group_of)
            groups = _quantiser.tune_rates(groups, points, group_of, trellis)
        points = self._points(values, groups, group_of, trellis)
        groups = _quantiser.tune_points(groups, points, values, group_of)
        channels = self.statistics.shape.num_channels
        row, component = np.divmod(order, channels)
        sizes = [
            int(component[self.statistics.bands[row] == band].max(initial=-1)) + 1
            for band in range(len(self.bases))
        ]
        bases = tuple(
            np.ascontiguousarray(basis[:size])
            for basis, size in zip(self.bases, sizes, strict=True)
        )
        return TransformTables(
            options=self.options,
            gain=self.statistics.gain,
            num_bands=self.statistics.num_bands,
            step=step,
            reference=self.statistics.reference,
            num_trellis=trellis,
            mean=self.statistics.mean,
            bases=bases,
            order=order.astype(np.int32),
            groups=groups,
        )

    def _points(
        self, values: np.ndarray, groups: np.ndarray, group_of: np.ndarray, trellis: int
    ) -> np.ndarray:
        indices = _quantise_in_parts(values, groups, group_of, trellis)
        return _quantiser.points(indices, _choices(indices, trellis))

    def _measure(self, tables: TransformTables) -> float:
        held, errors = self.statistics.held, []
        group_of = tables.group_of()
        scaled = np.float32(1 / tables.step)
        for start in range(0, len(held), 128):
            part = slice(start, start + 128)
            values = self.values[tables.order, part] * scaled
            indices = _quantise_in_parts(values, tables.groups, group_of, tables.num_trellis)
            planes = {
                "coefficients": np.clip(indices, -32_768, 32_767).astype(np.int16),
                "gains": np.ascontiguousarray(self.gains[part].T),
            }
            decoded = self.decode(tables, planes)
            by_metric = view_errors(held[part], decoded, self.statistics.shape)
            errors.append(by_metric[self.options.metric])
        return float(np.concatenate(errors).mean())


def _quantise_in_parts(
    values: np.ndarray, groups: np.ndarray, group_of: np.ndarray, trellis: int
) -> np.ndarray:
    result = np.empty(values.shape, np.int32)
    views = max(1, (1 << 20) // len(values))
    for start in range(0, values.shape[1], views):
        part = slice(start, start + views)
        result[:, part] = _quantiser.quantise(
            np.ascontiguousarray(values[:, part]), groups, group_of, trellis
        )
    return result


def _choices(indices: np.ndarray, trellis: int) -> np.ndarray:
    import torch

    views_first = torch.from_numpy(np.ascontiguousarray(indices[:trellis].T.astype(np.int16)))
    return np.asarray(_trellis.quantiser_choices(views_first).numpy().T)
