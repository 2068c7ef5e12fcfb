"""Codec files: configuration and tables of a feature codec in one safetensors file."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from scalekd.codecs.base import FeatureCodec
from scalekd.codecs.registry import codec_from_config
from scalekd.errors import CacheCorrupt
from scalekd.shapes import FeatureShape

_KEY = "scalekd_codec"
# Tables are a few mean maps and at most a few dozen channel bases: 2,048 channels and 32 bases take
# 270 MB. A larger file is not a codec file.
_MAX_BYTES = 4 << 30


def codec_to_bytes(codec: FeatureCodec) -> bytes:
    """Serialise a codec; the same codec always gives the same bytes."""
    config = json.dumps(codec.to_config(), sort_keys=True)
    tables = {name: np.ascontiguousarray(table) for name, table in codec.tables().items()}
    return bytes(save(tables, metadata={_KEY: config}))


def save_codec(path: Path, codec: FeatureCodec) -> None:
    """Write a codec file. The write is not atomic: the caller renames the file."""
    path.write_bytes(codec_to_bytes(codec))


def load_codec(path: Path, shape: FeatureShape) -> FeatureCodec:
    """Read a codec file for features of ``shape``.

    Raises:
        CacheCorrupt: The file is not a codec file, is damaged, or does not fit the shape.
        CacheMismatch: The codec or its version is unknown to this release.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CacheCorrupt(f"{path}: {path.stat().st_size} bytes are too many for codec tables")
        with safe_open(path, framework="numpy") as file:
            config = json.loads((file.metadata() or {})[_KEY])
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CacheCorrupt(f"{path}: not a readable codec file ({error})") from error
    if not isinstance(config, dict):
        raise CacheCorrupt(f"{path}: the codec configuration is not a JSON object")
    return codec_from_config(config, tables, shape)
