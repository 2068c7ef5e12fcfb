"""Eight-bit features, one scale per token.

A token's scale keeps a token of small norm as precise, relative to itself, as one of large norm;
one scale for the whole view would spend every level on the largest token. It is stored in single
precision: half precision would lose the scale of tokens below 1e-5 altogether.
"""

from typing import TYPE_CHECKING

import numpy as np

from scalekd.codecs.base import FeatureCodec
from scalekd.codecs.planes import PlaneSpec

if TYPE_CHECKING:
    import torch

    from scalekd.codecs.decoders import FeatureDecoder

_LEVELS = 127  # symmetric: -128 stays unused, so that decode(-codes) == -decode(codes)


class Int8Codec(FeatureCodec):
    """Features as ``code * scale``, with a code in -127…127 and one float32 scale per token.

    The error is at most half a scale; the scale is the token's largest magnitude divided by 127.
    """

    name = "int8"

    @property
    def planes(self) -> tuple[PlaneSpec, ...]:
        tokens, channels = self.shape.num_tokens, self.shape.num_channels
        codes, scales = np.dtype("int8"), np.dtype("float32")
        return (
            PlaneSpec("codes", codes, shape_after=(tokens, channels), compression="zstd"),
            PlaneSpec("scales", scales, shape_after=(tokens,), page_values=262_144),
        )

    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        self.check_features(features)
        values = features.astype(np.float32, copy=False)
        largest = np.maximum(values.max(axis=-1), -values.min(axis=-1))
        scales = largest / np.float32(_LEVELS)
        # Division by a subnormal scale would lose precision: such a token is stored as zero.
        scales[scales < np.finfo(np.float32).tiny] = 0
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
        codes = np.rint(values * inverse[..., None])
        np.clip(codes, -_LEVELS, _LEVELS, out=codes)
        return {"codes": codes.astype(np.int8), "scales": scales}

    def decoder(self, *, compute_dtype: "torch.dtype | None" = None) -> "FeatureDecoder":
        from scalekd.codecs.decoders import Int8Decoder

        return Int8Decoder()
