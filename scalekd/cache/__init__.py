"""The cache: manifest, files, reader, writer."""

from typing import TYPE_CHECKING

from scalekd._lazy import lazy

if TYPE_CHECKING:
    from scalekd.cache.codecs import CacheCodecs
    from scalekd.cache.reading.chosen import ChosenTargets
    from scalekd.cache.reading.decoded import read_features, read_logits
    from scalekd.cache.reading.extensions import JoinedReader, open_extension
    from scalekd.cache.reading.reader import CacheReader, SampleTable, open_cache, read_manifest
    from scalekd.distillation.decoding import JoinedTargets, TargetDecoder

__all__ = [
    "CacheCodecs",
    "CacheReader",
    "ChosenTargets",
    "JoinedReader",
    "JoinedTargets",
    "SampleTable",
    "TargetDecoder",
    "open_cache",
    "open_extension",
    "read_features",
    "read_logits",
    "read_manifest",
]

__getattr__ = lazy(__name__, __file__)
