"""Checks of configurations and tables read from a file, which may be damaged or malicious."""

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
    """Check name, version and keys of a configuration, and that a codec without tables has none.

    Args:
        codec: The class that the configuration should describe.
        config: Configuration as read from JSON.
        tables: Tables of the cache; passed only by codecs that have no tables.
        keys: Expected keys besides ``codec`` and ``version``.

    Raises:
        CacheMismatch: The codec is another one, or its version is unknown to this release.
        CacheCorrupt: Keys are missing or unknown, or a codec without tables has some.
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
    stored = frozenset(config) - {"codec", "version"}
    if stored != keys:
        raise CacheCorrupt(
            f"configuration of codec {codec.name!r} has keys {sorted(stored)}, "
            f"expected {sorted(keys)}"
        )
    if tables:
        raise CacheCorrupt(
            f"codec {codec.name!r} has no tables, but the cache contains {sorted(tables)}"
        )
