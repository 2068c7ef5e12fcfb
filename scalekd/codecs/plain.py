"""Half-precision features: the codec with the smallest error, and the baseline of the others."""

from typing import TYPE_CHECKING

import numpy as np

from scalekd.codecs.base import FeatureCodec
from scalekd.codecs.planes import PlaneSpec
from scalekd.errors import DataError

if TYPE_CHECKING:
    import torch

    from scalekd.codecs.decoders import FeatureDecoder


class Float16Codec(FeatureCodec):
    """Features in IEEE half precision, losslessly compressed (by about 1.1×).

    The relative error is at most 2**-11 for normal numbers; values beyond 65504 are refused.
    """

    name = "float16"

    @property
    def planes(self) -> tuple[PlaneSpec, ...]:
        tokens = (self.shape.num_tokens, self.shape.num_channels)
        return (PlaneSpec("values", np.dtype("float16"), shape_after=tokens, page_values=262_144),)

    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        self.check_features(features)
        with np.errstate(over="ignore"):
            values = features.astype(np.float16)
        overflow = ~np.isfinite(values)
        if overflow.any():
            view, token, channel = (int(i) for i in np.argwhere(overflow)[0])
            raise DataError(
                f"features of view {view} reach {features[view, token, channel]:.6g} at token "
                f"{token}, channel {channel}, beyond float16's 65504; use the int8 or transform "
                "codec, which scale"
            )
        return {"values": np.ascontiguousarray(values)}

    def decoder(self, *, compute_dtype: "torch.dtype | None" = None) -> "FeatureDecoder":
        from scalekd.codecs.decoders import Float16Decoder

        return Float16Decoder()
