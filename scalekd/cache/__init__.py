"""The cache: manifest, files, reader, writer."""

from scalekd.cache.reading.chosen import ChosenTargets
from scalekd.cache.reading.extensions import JoinedReader, open_extension
from scalekd.cache.reading.reader import CacheReader, SampleTable, open_cache, read_manifest
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
