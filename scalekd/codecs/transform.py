"""The transform codec: channel and cosine transforms, trellis quantisation, entropy coding.

Each token is divided by its length (the losses compare unit vectors), the mean map is subtracted, a
two-dimensional cosine transform over the token grid and, in each radial band of frequencies, a
Karhunen-Loève basis over the channels gather the energy in few coefficients. All have the same
step; coefficients that stay below it are dropped. The others are quantised along trellis paths
(:mod:`scalekd.codecs._trellis`), sorted by scale, and stored coefficient-major as 16-bit integers,
so that each page of pcodec has values of similar scale. Decoding is a few matrix products on the
training device.

``docs/codec.md`` explains the choices and gives the measurements.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Self

import numpy as np

from scalekd.codecs import _analysis, _fit, _quantiser
from scalekd.codecs._spatial import radial_bands
from scalekd.codecs._tables import TransformTables, tables_from
from scalekd.codecs.base import FeatureCodec, JsonDict
from scalekd.codecs.options import TransformOptions
from scalekd.codecs.planes import DEFAULT_PAGE_VALUES, PlaneSpec
from scalekd.shapes import FeatureShape

if TYPE_CHECKING:
    import torch

    from scalekd.codecs.decoders import FeatureDecoder
    from scalekd.codecs.encoder import FeatureEncoder

_CONFIG_KEYS = frozenset(
    {"error", "metric", "gain", "num_bands", "step", "reference", "num_trellis"}
)
_LARGEST = 32_000  # largest index; int16 ends at 32,767
# Values encoded at a time: the arrays of the trellis then stay in a core's cache, and memory does
# not grow with the block.
_BLOCK_VALUES = 1 << 20
# Pages in a block of 256 views: enough that each has coefficients of similar scale.
_PAGES = 48


def _planes(num_coefficients: int, num_gains: int) -> tuple[PlaneSpec, ...]:
    pages = min(max(256 * num_coefficients // _PAGES, 4096), DEFAULT_PAGE_VALUES)
    indices = np.dtype("int16")
    return (
        PlaneSpec("coefficients", indices, shape_before=(num_coefficients,), page_values=pages),
        PlaneSpec("gains", indices, shape_before=(num_gains,)),
    )


class TransformCodec(FeatureCodec):
    """Codec of two int16 planes, ``coefficients`` and ``gains``; the module describes the method.

    Single values have no error bound. The mean error over views like those of the calibration is
    the target error of the options.
    """

    name = "transform"

    def __init__(self, shape: FeatureShape, tables: TransformTables) -> None:
        super().__init__(shape)
        self.transform_tables = tables
        self._bands = radial_bands(shape, tables.num_bands)
        self._groups_of = tables.group_of()
        self._bases = tuple(basis.astype(np.float32) for basis in tables.bases)
        self._columns = _analysis.coefficient_columns(
            tables.order, self._bands, [len(basis) for basis in self._bases], shape.num_channels
        )

    @property
    def planes(self) -> tuple[PlaneSpec, ...]:
        tables = self.transform_tables
        return _planes(tables.num_coefficients, tables.num_gains(self.shape))

    @classmethod
    def outline(cls, config: JsonDict, shape: FeatureShape) -> tuple[PlaneSpec, ...]:
        cls.check_config(config, keys=_CONFIG_KEYS)
        return _planes(1, 1)

    @property
    def views_at_once(self) -> int:
        return max(1, _BLOCK_VALUES // (self.shape.num_tokens * self.shape.num_channels))

    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        self.check_features(features)
        tables = self.transform_tables
        num_views = len(features)
        coefficients = np.empty((tables.num_coefficients, num_views), np.int16)
        gains = np.empty((self.planes[1].shape_before[0], num_views), np.int16)
        at_once = self.views_at_once
        for start in range(0, num_views, at_once):
            part = slice(start, start + at_once)
            block = features[part]
            logs = _analysis.gain_logs(block, self.shape, tables.options.metric, tables.gain)
            stored = _analysis.quantise_gains(logs, tables.reference)
            coefficients[:, part], stored = self._encode_block(block, stored)
            gains[:, part] = stored.T
        return {"coefficients": coefficients, "gains": gains}

    def _encode_block(
        self, features: np.ndarray, gains: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantise a block; a view whose indices exceed int16 gets larger gains."""
        tables = self.transform_tables
        normalised = _analysis.normalise(features, gains, tables.reference)
        parts = _analysis.analyse(normalised, tables.mean, self._bases, self._bands, self.shape)
        joined = np.concatenate([part.reshape(len(features), -1) for part in parts], axis=1)
        values = joined.T[self._columns]
        values *= np.float32(1 / tables.step)
        limit = np.abs(values).max(axis=0)
        too_large = limit > 2 * _LARGEST
        if too_large.any():
            octaves = np.ceil(np.log2(limit[too_large] / _LARGEST)).astype(np.int16)
            gains = gains.copy()
            gains[too_large] += octaves[:, None] * _analysis.GAIN_STEPS
            return self._encode_block(features, gains)
        indices = _quantiser.quantise(values, tables.groups, self._groups_of, tables.num_trellis)
        return indices.astype(np.int16), gains

    def encoder(self, num_views: int) -> "FeatureEncoder":
        from scalekd.codecs._device_encoder import TransformEncoder

        return TransformEncoder(self.shape, self.transform_tables, num_views, _LARGEST)

    def decoder(self, *, compute_dtype: "torch.dtype | None" = None) -> "FeatureDecoder":
        from scalekd.codecs._decoder import TransformDecoder

        return TransformDecoder(self.shape, self.transform_tables, compute_dtype)

    def to_config(self) -> JsonDict:
        return super().to_config() | self.transform_tables.to_config()

    def tables(self) -> dict[str, np.ndarray]:
        return self.transform_tables.to_arrays()

    @classmethod
    def from_config(
        cls, config: JsonDict, tables: Mapping[str, np.ndarray], shape: FeatureShape
    ) -> Self:
        cls.check_config(config, keys=_CONFIG_KEYS)
        return cls(shape, tables_from(config, tables, shape))

    @classmethod
    def fit(
        cls,
        shape: FeatureShape,
        calibration: Iterable[np.ndarray],
        *,
        options: TransformOptions,
        num_threads: int = 1,
    ) -> "TransformCodec":
        """Fit to calibration views; see :func:`scalekd.codecs.fit_codec`."""

        def decode(tables: TransformTables, planes: Mapping[str, np.ndarray]) -> np.ndarray:
            return cls(shape, tables).decode(planes)

        tables = _fit.fit(shape, calibration, options, decode, num_threads=num_threads)
        return cls(shape, tables)
