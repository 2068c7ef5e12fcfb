"""The encoder of the transform codec as torch operations on the device of the features.

It follows ``TransformCodec.encode`` step by step. The row axis comes before the view axis, so that
the products give coefficients in the order in which they are stored.
"""

import numpy as np
import torch
from torch import Tensor

from scalekd.codecs import _analysis, _viterbi
from scalekd.codecs._spatial import grid_matrices, radial_bands
from scalekd.codecs._tables import SHIFT, THRESHOLD, WEIGHT, TransformTables
from scalekd.codecs._trellis import STEPS
from scalekd.codecs.encoder import Encoding, FeatureEncoder
from scalekd.shapes import FeatureShape

# Values encoded at a time: 134 MB for each of about five float32 temporaries.
_MOST_VALUES = 1 << 25


class TransformEncoder(FeatureEncoder):
    """Gains, cosine transform, channel transforms of each band, and quantisation.

    Args:
        shape: Shape of the features.
        tables: Tables of the codec.
        num_views: Number of views in a batch; smaller batches are padded, so that all matrix
            products have the same shape.
        largest: Largest index that a plane can store.
    """

    columns: Tensor
    shift: Tensor
    weight: Tensor
    threshold: Tensor
    slab_weights: Tensor
    row_order: Tensor

    def __init__(
        self, shape: FeatureShape, tables: TransformTables, num_views: int, largest: int
    ) -> None:
        super().__init__()
        self.shape = shape
        self._tables = tables
        self._largest = largest
        most = max(1, _MOST_VALUES // (shape.num_tokens * shape.num_channels))
        num_chunks = -(-num_views // most)
        self._chunk = -(-num_views // num_chunks)
        bands = radial_bands(shape, tables.num_bands)
        sizes = [len(basis) for basis in tables.bases]
        self._rows = np.bincount(bands).tolist()
        groups = tables.groups[tables.group_of()]
        columns = _analysis.coefficient_columns(tables.order, bands, sizes, shape.num_channels)
        self._register("mean_map", tables.mean)
        self._register("columns", columns)
        for name, column in (("shift", SHIFT), ("weight", WEIGHT), ("threshold", THRESHOLD)):
            self._register(name, groups[:, column][:, None])
        self._register("slab_weights", tables.groups[:STEPS, WEIGHT])
        for band, basis in enumerate(tables.bases):
            self._register(f"basis_{band}", basis.astype(np.float32))
        # Rows are sorted by band: frequencies first, prefix tokens last.
        order, matrices = grid_matrices(shape, bands)
        self._dense = len(matrices) == 1
        for index, matrix in enumerate(matrices):
            self._register(f"spatial_{index}", matrix)
        self._register("row_order", order)

    def _register(self, name: str, array: np.ndarray) -> None:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        self.register_buffer(name, tensor, persistent=False)

    def forward(self, features: Tensor, octaves: Tensor | None = None) -> Encoding:
        num_views = len(features)
        extra = features.new_zeros(num_views, dtype=torch.int16) if octaves is None else octaves
        missing = -num_views % self._chunk
        if missing:
            features = torch.cat([features, features.new_zeros(missing, *features.shape[1:])])
            extra = torch.cat([extra, extra.new_zeros(missing)])
        with torch.autocast(features.device.type, enabled=False):
            parts = [
                self._encode(chunk.float(), more)
                for chunk, more in zip(
                    torch.split(features, self._chunk), torch.split(extra, self._chunk), strict=True
                )
            ]
        coefficients, gains, finite, more_octaves = (
            torch.cat(part, dim=axis) if len(part) > 1 else part[0]
            for part, axis in zip(zip(*parts, strict=True), (1, 1, 0, 0), strict=True)
        )
        if missing:
            coefficients = coefficients[:, :num_views].contiguous()
            gains = gains[:, :num_views].contiguous()
        planes = {"coefficients": coefficients, "gains": gains}
        return Encoding(planes, finite[:num_views], more_octaves[:num_views])

    def _encode(self, features: Tensor, octaves: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return coefficients, gains, finite tokens and missing octaves of a chunk of views."""
        gains, finite = self._gains(features)
        gains = gains + (octaves * _analysis.GAIN_STEPS)[:, None]
        exponent = gains.double() / _analysis.GAIN_STEPS + self._tables.reference
        inverse = torch.exp2(-exponent).float()
        tokens = torch.addcmul(-self.get_buffer("mean_map"), features, inverse[..., None])
        rows = self._frequencies(tokens.transpose(0, 1))
        values = self._components(rows).index_select(0, self.columns)
        values *= float(np.float32(1 / self._tables.step))
        limit = values.abs().amax(dim=0)
        excess = torch.log2(limit.double() / self._largest).ceil()
        fits = ~(limit > 2 * self._largest)  # NaN is reported by `finite`
        missing = torch.where(fits, torch.zeros_like(excess), excess).to(torch.int16)
        return self._quantise(values), gains.T.contiguous(), finite, missing

    def _gains(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return stored gains, int16 ``(view, gain)``, and whether each token is finite."""
        tables, first = self._tables, self.shape.num_prefix_tokens
        lengths = _lengths(features)
        finite = lengths.isfinite()
        if tables.options.metric == "frequency":
            patches = features[:, first:]
            distances = _lengths(patches - patches.mean(dim=1, keepdim=True))
            typical = distances.square().mean(dim=1, keepdim=True).sqrt()
            floor = _analysis.FREQUENCY_FLOOR * typical
            lengths = torch.cat([lengths[:, :first], torch.maximum(distances, floor)], dim=1)
        if tables.gain == "view":
            lengths = lengths.square().mean(dim=1, keepdim=True).sqrt()
        logs = lengths.log2()
        reference = torch.full_like(logs, tables.reference)
        octaves = torch.where(logs.isfinite(), logs, reference)
        octaves = octaves.clamp(-_analysis.MAX_OCTAVES, _analysis.MAX_OCTAVES)
        gains = ((octaves - tables.reference) * _analysis.GAIN_STEPS).round()
        return gains.to(torch.int16), finite

    def _frequencies(self, tokens: Tensor) -> Tensor:
        """Transform token-first features over the grid: ``(row by band, view, channel)``."""
        first = self.shape.num_prefix_tokens
        _, views, channels = tokens.shape
        patches = tokens[first:].contiguous()
        if self._dense:
            rows = self.get_buffer("spatial_0") @ patches.view(len(patches), -1)
        else:
            height, width = self.shape.grid
            along = torch.matmul(self.get_buffer("spatial_1"), patches.view(height, width, -1))
            rows = (self.get_buffer("spatial_0") @ along.view(height, -1)).view(len(patches), -1)
            rows = rows.index_select(0, self.row_order)
        rows = rows.view(len(patches), views, channels)
        return torch.cat([rows, tokens[:first]]) if first else rows

    def _components(self, rows: Tensor) -> Tensor:
        """Transform over the channels, band by band: ``(coefficient by band, view)``."""
        parts = []
        for band, part in enumerate(torch.split(rows, self._rows)):
            product = torch.matmul(self.get_buffer(f"basis_{band}"), part.transpose(1, 2))
            parts.append(product.reshape(-1, rows.shape[1]))
        return torch.cat(parts)

    def _quantise(self, values: Tensor) -> Tensor:
        """Quantise coefficients, in units of the fine step, to int16 indices."""
        count = self._tables.num_trellis
        magnitude = values.abs()
        moved = (magnitude - self.shift).clamp_(min=0)
        indices = torch.empty(values.shape, dtype=torch.int16, device=values.device)
        if count:
            targets = torch.copysign(moved[:count] / self.weight[:count], values[:count])
            indices[:count] = _viterbi.search(targets, self.slab_weights)
        levels = (moved[count:] * 0.5).round_().clamp_(min=1)
        levels.masked_fill_(magnitude[count:] <= self.threshold[count:], 0)
        indices[count:] = torch.copysign(levels, values[count:]).to(torch.int16)
        return indices


def _lengths(features: Tensor) -> Tensor:
    """Return the length of each token, float64 ``(view, token)``; finite if the token is."""
    lengths: Tensor = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float64)
    return lengths
