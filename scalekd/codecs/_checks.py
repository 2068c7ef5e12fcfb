"""Checks of configurations and tables that came from a file, and so may be damaged or foreign."""

from collections.abc import Mapping

import numpy as np

from scalekd.codecs.base import Codec, JsonDict
from scalekd.errors import CacheCorrupt, CacheMismatch


def check_config(
    codec: type[Codec],
    config: JsonDict,
    tables: Mapping[str, np.ndarray] | None = None,
    *,
    keys: frozenset[str] = frozenset(),
) -> None:
    """Check name, version and exact keys of a configuration, and that a table-free codec has none.

    Args:
        codec: The class that the configuration should describe.
        config: As read from JSON.
        tables: Given by codecs without tables.
        keys: Keys expected besides ``codec`` and ``version``.

    Raises:
        CacheMismatch: Another codec, or a version that this release does not know.
        CacheCorrupt: Keys are missing or unknown, or tables came with a codec that has none.
    """
    if config.get("codec") != codec.name:
        raise CacheMismatch(
            f"the configuration describes codec {config.get('codec')!r}, not {codec.name!r}"
        )
    if config.get("version") != codec.version:
        raise CacheMismatch(
            f"codec {codec.name!r} is stored in version {config.get('version')!r} and this release "
            f"reads version {codec.version}; install the release that wrote the cache, or newer"
        )
    found = frozenset(config) - {"codec", "version"}
    if found != keys:
        raise CacheCorrupt(
            f"configuration of codec {codec.name!r} has keys {sorted(found)}, "
            f"expected {sorted(keys)}"
        )
    if tables:
        raise CacheCorrupt(
            f"codec {codec.name!r} has no tables, but the cache holds {sorted(tables)}"
        )
