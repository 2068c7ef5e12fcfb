"""The JSON documents of a cache as models; ``base`` has the rules that all of them follow."""

from scalekd.cache.documents.base import (
    FORMAT,
    FORMAT_VERSION,
    MAX_JSON_BYTES,
    OMIT_DEFAULT,
    CacheDocument,
    Model,
    canonical,
    check_depth,
    parse,
    parse_committed,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MAX_JSON_BYTES",
    "OMIT_DEFAULT",
    "CacheDocument",
    "Model",
    "canonical",
    "check_depth",
    "parse",
    "parse_committed",
]
