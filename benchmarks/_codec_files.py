"""Codec files: configuration and tables of a fitted codec in one safetensors file."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from scalekd.codecs import FeatureCodec, codec_from_config
from scalekd.shapes import FeatureShape

_KEY = "scalekd_codec"


def codec_to_bytes(codec: FeatureCodec) -> bytes:
    """Serialise a codec; the same codec always gives the same bytes."""
    config = json.dumps(codec.to_config(), sort_keys=True)
    tables = {name: np.ascontiguousarray(table) for name, table in codec.tables().items()}
    return bytes(save(tables, metadata={_KEY: config}))


def save_codec(path: Path, codec: FeatureCodec) -> None:
    """Write a codec file."""
    path.write_bytes(codec_to_bytes(codec))


def load_codec(path: Path, shape: FeatureShape) -> FeatureCodec:
    """Read a codec file for features of ``shape``."""
    with safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()[_KEY])
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return codec_from_config(config, tables, shape)
