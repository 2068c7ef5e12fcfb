"""Construct codecs by name, from options or from a plan.

Options have the form ``name`` or ``name:key=value,key=value`` (``transform:error=0.01``), for
logits ``full`` or ``topk:K``. A plan contains the codec's configuration; its tables are files.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from scalekd.codecs.base import FeatureCodec, JsonDict, LogitCodec
from scalekd.codecs.int8 import Int8Codec
from scalekd.codecs.logits import FullLogitCodec, TopKLogitCodec
from scalekd.codecs.options import TransformOptions
from scalekd.codecs.plain import Float16Codec
from scalekd.codecs.planes import PlaneSpec
from scalekd.codecs.transform import TransformCodec
from scalekd.errors import CacheMismatch, UsageError
from scalekd.shapes import FeatureShape
from scalekd.text import did_you_mean

_FEATURE_CODECS: dict[str, type[FeatureCodec]] = {
    codec.name: codec for codec in (Float16Codec, Int8Codec, TransformCodec)
}
_LOGIT_CODECS: dict[str, type[LogitCodec]] = {
    codec.name: codec for codec in (FullLogitCodec, TopKLogitCodec)
}


@dataclass(frozen=True)
class CodecRequest:
    """A requested feature codec; ``str()`` gives the normalised form of the parsed text."""

    name: str
    options: TransformOptions | None = None

    def num_calibration_views(self, shape: FeatureShape) -> int:
        """Return the number of views for :func:`fit_codec`; 0 for a codec without tables."""
        return 0 if self.options is None else self.options.num_calibration_views(shape)

    def __str__(self) -> str:
        return self.name if self.options is None else f"{self.name}:{self.options}"


def parse_codec(text: str) -> CodecRequest:
    """Read ``float16``, ``int8`` or ``transform[:error=0.01][,metric=spatial|frequency|raw]``.

    Raises:
        UsageError: The codec, an option or a value is unknown.
    """
    name, _, rest = text.partition(":")
    if name not in _FEATURE_CODECS:
        raise UsageError(_unknown("codec", name, _FEATURE_CODECS))
    if name == TransformCodec.name:
        return CodecRequest(name, TransformOptions.parse(rest))
    if rest:
        raise UsageError(f"codec {name!r} takes no options, got {rest!r}")
    return CodecRequest(name)


def fit_codec(
    request: str | CodecRequest,
    shape: FeatureShape,
    calibration: Iterable[np.ndarray] | None = None,
    *,
    num_threads: int = 1,
) -> FeatureCodec:
    """Make a codec; fit its tables, if it has any, on calibration views.

    Args:
        request: The codec, as text that :func:`parse_codec` reads or parsed.
        shape: Shape of the stage's features.
        calibration: Blocks of features ``(view, token, channel)``, read once and in order. The same
            blocks give the same tables on the same machine.
        num_threads: Threads that fit; the tables do not depend on their number.

    Raises:
        UsageError: The codec needs calibration views and there are none, or their shape differs.
        DataError: Calibration views contain NaN or infinity.
    """
    parsed = parse_codec(request) if isinstance(request, str) else request
    if parsed.options is None:
        return _FEATURE_CODECS[parsed.name](shape)
    if calibration is None:
        raise UsageError(f"codec {parsed} is fitted on features of the data set, and got none")
    return TransformCodec.fit(shape, calibration, options=parsed.options, num_threads=num_threads)


def codec_outline(config: JsonDict, shape: FeatureShape) -> tuple[PlaneSpec, ...]:
    """Return the planes of a codec in a cache without its tables; see `FeatureCodec.outline`.

    Raises:
        CacheCorrupt, CacheMismatch: As for :func:`codec_from_config`.
    """
    return _feature_codec(config).outline(config, shape)


def codec_from_config(
    config: JsonDict, tables: Mapping[str, np.ndarray], shape: FeatureShape
) -> FeatureCodec:
    """Rebuild a feature codec from its configuration and tables in a cache.

    Raises:
        CacheMismatch: The codec or its version is unknown to this release.
        CacheCorrupt: Configuration or tables are inconsistent.
    """
    return _feature_codec(config).from_config(config, tables, shape)


def _feature_codec(config: JsonDict) -> type[FeatureCodec]:
    name = config.get("codec")
    if not isinstance(name, str) or name not in _FEATURE_CODECS:
        raise CacheMismatch(_unknown("codec", str(name), _FEATURE_CODECS))
    return _FEATURE_CODECS[name]


def create_logit_codec(text: str, num_classes: int) -> LogitCodec:
    """Make the logit codec for the text ``full`` or ``topk:K``.

    Raises:
        UsageError: The text is another one, or K is out of range.
    """
    name, _, rest = text.partition(":")
    if name == FullLogitCodec.name and not rest:
        return FullLogitCodec(num_classes)
    if name == TopKLogitCodec.name and re.fullmatch(r"[0-9]{1,9}", rest):
        return TopKLogitCodec(num_classes, int(rest))
    raise UsageError(
        f"logits {text!r}: give full for all classes, topk:K for the K likeliest, or none"
    )


def check_logit_codec(text: str) -> None:
    """Check the spelling of ``full`` or ``topk:K``, before the number of classes is known.

    Raises:
        UsageError: The text is invalid. The largest K is checked by :func:`create_logit_codec`.
    """
    digits = re.fullmatch(r"topk:([0-9]{1,9})", text)
    num_kept = int(digits[1]) if digits else 1
    if num_kept == 0:
        raise UsageError(f"--logits {text} keeps no class; give a number from 1, or --logits none")
    create_logit_codec(text, num_kept)


def logit_codec_from_config(config: JsonDict) -> LogitCodec:
    """Rebuild a logit codec from its configuration.

    Raises:
        CacheMismatch: The codec or its version is unknown to this release.
        CacheCorrupt: The configuration is invalid.
    """
    name = config.get("codec")
    if not isinstance(name, str) or name not in _LOGIT_CODECS:
        raise CacheMismatch(_unknown("logit codec", str(name), _LOGIT_CODECS))
    return _LOGIT_CODECS[name].from_config(config)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    listed = ", ".join(names)
    return f"unknown {what} {name!r}: this release knows {listed}{did_you_mean(name, names)}"
