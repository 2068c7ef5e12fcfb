"""Fitting of the transform codec: statistics in one pass, then the step by bisection.

Four views in five contribute to the mean and the bases, and are not kept. Every fifth is held out,
and the step and the tuning of the quantisers are fitted to those: on views that contributed to the
bases, the smallest components look smaller than they are.

Threads compute bands and groups of views, which do not depend on one another and are put together
in order: the tables do not depend on the number of threads.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from scalekd.codecs import _analysis, _quantiser, _trellis
from scalekd.codecs._statistics import Statistics, accumulate
from scalekd.codecs._tables import TransformTables, coefficient_groups
from scalekd.codecs.measure import view_errors
from scalekd.codecs.options import TransformOptions
from scalekd.shapes import FeatureShape

# Weight of the covariance of all bands in that of one band: tokens per channel.
_POOLING = 0.5
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


def fit(
    shape: FeatureShape,
    calibration: Iterable[np.ndarray],
    options: TransformOptions,
    decode: Decode,
    *,
    num_threads: int = 1,
) -> TransformTables:
    """Fit the tables of a transform codec.

    Args:
        shape: Shape of one view's features.
        calibration: Blocks of features ``(view, token, channel)``, read once and in order.
        options: Target error.
        decode: Function that decodes planes with given tables.
        num_threads: Threads, which BLAS should not divide further.

    Raises:
        UsageError: There are no views, or their shape differs.
        DataError: A view contains NaN or infinity.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        statistics = accumulate(shape, calibration, options, pool)
        bases = _bases(statistics, pool)
        held = statistics.held
        logs = _analysis.gain_logs(held, shape, options.metric, statistics.gain)
        gains = _analysis.quantise_gains(logs, statistics.reference)
        values = _coefficients(statistics, gains, bases, shape)
        sigmas = _sigmas(values, statistics, bases)
        order = np.argsort(-sigmas, kind="stable")
        return _Search(statistics, options, bases, values, sigmas, order, gains, decode, pool).run()


def _bases(statistics: Statistics, pool: Executor) -> tuple[np.ndarray, ...]:
    """Return the eigenvectors of each band, float16 ``(component, channel)``, by falling energy."""
    shape, bands = statistics.shape, statistics.bands
    is_prefix = np.zeros(int(bands.max()) + 1, bool)
    is_prefix[bands[: shape.num_prefix_tokens]] = True
    counts = np.bincount(bands) * float(statistics.num_views)

    def basis(band: int) -> np.ndarray:
        moment = statistics.moments[band]
        family = is_prefix == is_prefix[band]
        pooled = statistics.moments[family].sum(axis=0) / counts[family].sum()
        # The pooled covariance is scaled to the energy of the band.
        level = np.trace(moment) / max(counts[band] * np.trace(pooled), 1e-300)
        covariance = moment + _POOLING * shape.num_channels * level * pooled
        _, vectors = np.linalg.eigh(covariance)
        vectors = vectors[:, ::-1]
        # Eigenvectors are defined up to a sign: make the largest entry positive.
        largest = np.abs(vectors).argmax(axis=0)
        vectors = vectors * np.where(vectors[largest, np.arange(len(largest))] < 0, -1, 1)
        return np.ascontiguousarray(vectors.T).astype(np.float16)

    return tuple(pool.map(basis, range(len(counts))))


def _coefficients(
    statistics: Statistics, gains: np.ndarray, bases: tuple[np.ndarray, ...], shape: FeatureShape
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
    values: np.ndarray, statistics: Statistics, bases: tuple[np.ndarray, ...]
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

    statistics: Statistics
    options: TransformOptions
    bases: tuple[np.ndarray, ...]
    values: np.ndarray
    sigmas: np.ndarray
    order: np.ndarray
    gains: np.ndarray
    decode: Decode
    pool: Executor

    def run(self) -> TransformTables:
        target = self.options.error
        # Start near the target, at the step whose white noise would have about this error.
        step = float(np.sqrt(target / (0.27 * self.statistics.shape.num_channels)))
        low: tuple[float, float] | None = None
        high: tuple[float, float] | None = None
        trials: list[tuple[float, TransformTables]] = []
        for _ in range(_MAX_ITERATIONS):
            tables = self._tune(step)
            error = self._measure(tables)
            miss = abs(np.log(max(error, 1e-30) / target))
            trials.append((miss, tables))
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
        return min(trials, key=lambda trial: trial[0])[1]

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
        indices = _quantise_in_parts(values, groups, group_of, trellis, self.pool)
        return _quantiser.points(indices, _choices(indices, trellis))

    def _measure(self, tables: TransformTables) -> float:
        held, group_of = self.statistics.held, tables.group_of()
        scaled = np.float32(1 / tables.step)

        def errors(start: int) -> np.ndarray:
            part = slice(start, start + 128)
            values = self.values[tables.order, part] * scaled
            # Not in the pool, whose threads may all be in this function.
            indices = _quantise_in_parts(values, tables.groups, group_of, tables.num_trellis)
            planes = {
                "coefficients": np.clip(indices, -32_768, 32_767).astype(np.int16),
                "gains": np.ascontiguousarray(self.gains[part].T),
            }
            decoded = self.decode(tables, planes)
            by_metric = view_errors(held[part], decoded, self.statistics.shape)
            return by_metric[self.options.metric]

        parts = range(0, len(held), 128)
        return float(np.concatenate(list(self.pool.map(errors, parts))).mean())


def _quantise_in_parts(
    values: np.ndarray,
    groups: np.ndarray,
    group_of: np.ndarray,
    trellis: int,
    pool: Executor | None = None,
) -> np.ndarray:
    result = np.empty(values.shape, np.int32)
    views = max(1, (1 << 20) // len(values))

    def quantise(start: int) -> None:
        part = slice(start, start + views)
        result[:, part] = _quantiser.quantise(
            np.ascontiguousarray(values[:, part]), groups, group_of, trellis
        )

    for _ in (pool.map if pool else map)(quantise, range(0, values.shape[1], views)):
        pass  # raises what a thread raised
    return result


def _choices(indices: np.ndarray, trellis: int) -> np.ndarray:
    import torch

    views_first = torch.from_numpy(np.ascontiguousarray(indices[:trellis].T.astype(np.int16)))
    return np.asarray(_trellis.quantiser_choices(views_first).numpy().T)
