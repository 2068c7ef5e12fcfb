"""The cache: manifest, files, reader, writer."""

from scalekd.cache.chosen import ChosenTargets
from scalekd.cache.extensions import JoinedReader, open_extension
from scalekd.cache.reader import CacheReader, SampleTable, open_cache, read_manifest
from scalekd.cache.targets import CacheCodecs, JoinedTargets, TargetDecoder

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
    "read_manifest",
]
