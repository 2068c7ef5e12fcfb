"""Codecs that encode features and logits as small integer arrays; ``base`` has the contract."""

from typing import TYPE_CHECKING

from scalekd._lazy import lazy

if TYPE_CHECKING:
    from scalekd.codecs.base import Codec, FeatureCodec, LogitCodec
    from scalekd.codecs.decoders import FeatureDecoder, LogitDecoder
    from scalekd.codecs.int8 import Int8Codec
    from scalekd.codecs.logits import FullLogitCodec, TopKLogitCodec
    from scalekd.codecs.measure import (
        ErrorSummary,
        FeatureErrors,
        measure_errors,
        summarise,
        view_errors,
    )
    from scalekd.codecs.options import TransformOptions
    from scalekd.codecs.plain import Float16Codec
    from scalekd.codecs.planes import PlaneSpec, quiet_zarr
    from scalekd.codecs.registry import (
        CodecRequest,
        check_logit_codec,
        codec_from_config,
        codec_outline,
        create_logit_codec,
        fit_codec,
        logit_codec_from_config,
        parse_codec,
    )
    from scalekd.codecs.transform import TransformCodec

__all__ = [
    "Codec",
    "CodecRequest",
    "ErrorSummary",
    "FeatureCodec",
    "FeatureDecoder",
    "FeatureErrors",
    "Float16Codec",
    "FullLogitCodec",
    "Int8Codec",
    "LogitCodec",
    "LogitDecoder",
    "PlaneSpec",
    "TopKLogitCodec",
    "TransformCodec",
    "TransformOptions",
    "check_logit_codec",
    "codec_from_config",
    "codec_outline",
    "create_logit_codec",
    "fit_codec",
    "logit_codec_from_config",
    "measure_errors",
    "parse_codec",
    "quiet_zarr",
    "summarise",
    "view_errors",
]

__getattr__ = lazy(__name__, __file__)
