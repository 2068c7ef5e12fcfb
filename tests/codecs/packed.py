"""Decode the result of ``Codec.pack`` as readers of a cache do."""

from collections.abc import Mapping

import numpy as np

from scalekd.codecs import Codec
from scalekd.codecs.compression import decompress


def unpack(codec: Codec, packed: Mapping[str, bytes], num_views: int) -> dict[str, np.ndarray]:
    """Return the stored planes of ``num_views`` views."""
    return {
        spec.name: decompress(
            packed[spec.name], spec.compression, spec.dtype, num_views * spec.values_per_view
        )
        .reshape(spec.stored_shape(num_views))
        .copy()
        for spec in codec.planes
    }
