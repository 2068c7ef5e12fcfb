"""The decoder of the transform codec: integers to features in a few matrix products."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from scalekd.codecs import _trellis
from scalekd.codecs._analysis import GAIN_STEPS, coefficient_columns
from scalekd.codecs._spatial import grid_matrices, radial_bands
from scalekd.codecs._tables import TransformTables
from scalekd.codecs.decoders import FeatureDecoder
from scalekd.shapes import FeatureShape

# On a CPU, small chunks of views stay in its caches (a third faster than 256 at once).
_CPU_VIEWS = 16


class TransformDecoder(FeatureDecoder):
    """Inverse quantisation, channel transforms of each band, cosine transform and gains."""

    sources: Tensor
    scale: Tensor
    pull: Tensor
    mean: Tensor

    def __init__(
        self,
        shape: FeatureShape,
        tables: TransformTables,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        compute_dtype = compute_dtype or torch.float32
        self.shape = shape
        self.compute_dtype = compute_dtype
        self.num_trellis = tables.num_trellis
        self.reference = tables.reference
        bands = radial_bands(shape, tables.num_bands)
        sizes = [len(basis) for basis in tables.bases]
        self._rows = np.bincount(bands).tolist()
        self._sizes = sizes
        columns = coefficient_columns(tables.order, bands, sizes, shape.num_channels)
        tuning = tables.groups[tables.group_of()] * np.float32(tables.step)
        total = sum(rows * size for rows, size in zip(self._rows, sizes, strict=True))
        sources = torch.full((total,), len(columns))
        sources[torch.from_numpy(columns)] = torch.arange(len(columns))
        self.register_buffer("sources", sources, persistent=False)
        self.register_buffer("scale", torch.from_numpy(tuning[:, 0].copy()), persistent=False)
        self.register_buffer("pull", torch.from_numpy(tuning[:, 1].copy()), persistent=False)
        self.register_buffer("mean", torch.from_numpy(tables.mean.copy()), persistent=False)
        for band, basis in enumerate(tables.bases):
            matrix = torch.from_numpy(basis.astype(np.float32)).to(compute_dtype)
            self.register_buffer(f"basis_{band}", matrix, persistent=False)
        # Rows are sorted by band: frequencies first, prefix tokens last.
        order, matrices = grid_matrices(shape, bands)
        self.dense = len(matrices) == 1
        for index, forward in enumerate(matrices):
            inverse = torch.from_numpy(np.ascontiguousarray(forward.T)).to(compute_dtype)
            self.register_buffer(f"spatial_{index}", inverse, persistent=False)
        unsort = torch.from_numpy(np.argsort(order, kind="stable"))
        self.register_buffer("unsort", unsort, persistent=False)

    def forward(self, planes: Mapping[str, Tensor]) -> Tensor:
        indices = planes["coefficients"]
        gains = torch.exp2(planes["gains"].float() / GAIN_STEPS + self.reference)[..., None]
        if indices.device.type != "cpu" or len(indices) <= _CPU_VIEWS:
            return self._synthesise(self._dequantise(indices)) * gains
        shape = (len(indices), self.shape.num_tokens, self.shape.num_channels)
        result = gains.new_empty(shape)
        for start in range(0, len(indices), _CPU_VIEWS):
            part = slice(start, start + _CPU_VIEWS)
            tokens = self._synthesise(self._dequantise(indices[part]))
            torch.mul(tokens, gains[part], out=result[part])
        return result

    def _dequantise(self, indices: Tensor) -> Tensor:
        """Return all coefficients, dropped ones as zero: ``(view, coefficient by band)``."""
        points = indices.float().mul_(2)
        if self.num_trellis:
            trellis = points[:, : self.num_trellis]
            choices = _trellis.quantiser_choices(indices[:, : self.num_trellis])
            trellis.add_(0.5).mul_(choices.float().mul_(-2).add_(1))
        near = points.clamp(-0.5, 0.5).mul_(self.pull)
        values = points.new_zeros((len(indices), points.shape[1] + 1), dtype=self.compute_dtype)
        values[:, :-1] = near.addcmul_(points, self.scale)
        # Gathering is three times as fast as scattering; dropped ones read the zero at the end.
        return values.index_select(1, self.sources)

    def _synthesise(self, coefficients: Tensor) -> Tensor:
        """Invert both transforms and add the mean: normalised ``(view, token, channel)``."""
        views, channels = len(coefficients), self.shape.num_channels
        rows = coefficients.new_empty((views, self.shape.num_tokens, channels))
        start = first_row = 0
        for band, (count, size) in enumerate(zip(self._rows, self._sizes, strict=True)):
            part = coefficients[:, start : start + count * size].reshape(views * count, size)
            product = part @ self.get_buffer(f"basis_{band}")
            rows[:, first_row : first_row + count] = product.view(views, count, channels)
            start, first_row = start + count * size, first_row + count
        num_patches = self.shape.num_patch_tokens
        patches = rows[:, :num_patches]
        if self.dense:
            spatial = self.get_buffer("spatial_0")
            grid = torch.matmul(spatial, patches)
        else:
            height, width = self.shape.grid
            patches = patches[:, self.get_buffer("unsort")]
            grid = torch.matmul(
                self.get_buffer("spatial_0"), patches.reshape(views, height, width * channels)
            )
            grid = torch.matmul(
                self.get_buffer("spatial_1"), grid.view(views * height, width, channels)
            )
        grid = grid.view(views, num_patches, channels)
        if self.shape.num_prefix_tokens:
            grid = torch.cat([rows[:, num_patches:], grid], dim=1)
        return grid.float() + self.mean
