"""Codec files: configuration and tables in one safetensors file, exact and never unpickled."""

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
# Tables are a few mean maps and at most a few dozen channel bases: 2,048 channels and 32 bases
# come to 270 MB. A file that claims more than this is not one of ours.
_MAX_BYTES = 4 << 30


def codec_to_bytes(codec: FeatureCodec) -> bytes:
    """Serialise a codec; the same codec always gives the same bytes."""
    config = json.dumps(codec.to_config(), sort_keys=True)
    tables = {name: np.ascontiguousarray(table) for name, table in codec.tables().items()}
    return bytes(save(tables, metadata={_KEY: config}))


def save_codec(path: Path, codec: FeatureCodec) -> None:
    """Write a codec file; the caller commits it (temporary name, fsync, rename)."""
    path.write_bytes(codec_to_bytes(codec))


def load_codec(path: Path, shape: FeatureShape) -> FeatureCodec:
    """Read a codec file for features of ``shape``.

    Raises:
        CacheCorrupt: Not such a file, damaged, or tables that do not fit the shape.
        CacheMismatch: A codec or version that this release does not know.
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
