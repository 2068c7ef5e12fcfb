"""The cache: manifest, files, reader, writer."""

from scalekd.cache.reader import CacheReader, SampleTable, open_cache, read_manifest
from scalekd.cache.targets import CacheCodecs, TargetDecoder

__all__ = [
    "CacheCodecs",
    "CacheReader",
    "SampleTable",
    "TargetDecoder",
    "open_cache",
    "read_manifest",
]
