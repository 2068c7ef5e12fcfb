"""Codecs and decoders, under the name that they had up to version 0.2.

See :mod:`scalekd.cache.codecs` and :mod:`scalekd.distillation.decoding`.
"""

from scalekd.cache.codecs import CacheCodecs
from scalekd.distillation.decoding import NO_LOGITS, JoinedTargets, TargetDecoder

__all__ = ["NO_LOGITS", "CacheCodecs", "JoinedTargets", "TargetDecoder"]
