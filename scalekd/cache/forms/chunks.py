"""Decode Zarr chunks of a cache whose metadata were compared with the plan.

Arrays are written with zarr-python, but not read with it, because it instantiates any codec that a
metadata document names. Format 1 has three compressions; each is decoded into an array whose shape
and type come from the plan (:mod:`scalekd.codecs.compression`).
"""

import json
import math
from typing import Any

import google_crc32c
import numpy as np

from scalekd.cache.documents import check_depth
from scalekd.cache.documents.manifest import Identity
from scalekd.cache.layout import ArraySpec
from scalekd.codecs.compression import Compression, check_expansion, decompress
from scalekd.errors import CacheCorrupt
from scalekd.shapes import Rows

MAX_METADATA_BYTES = 64 << 10
"""Largest size of a ``zarr.json``; real ones have less than one kilobyte."""

_ROWS_AT_ONCE = 64  # int16: two cache lines of every view; the times of 32 and 128 are similar

_ZARR_CODECS: dict[Compression, tuple[str, ...]] = {
    "blosc": ("bytes", "blosc"),
    "zstd": ("bytes", "zstd", "crc32c"),
    "pcodec": ("numcodecs.pcodec", "crc32c"),
}
_CRC_BYTES = 4
_CRC_PART_BYTES = 64 << 10


def check_metadata(content: bytes, identity: Identity, array: ArraySpec, path: str) -> None:
    """Check that a ``zarr.json`` describes the array that the plan describes.

    Args:
        content: Content of the document, which has the committed digest.
        identity: Identity of the cache.
        array: Array of the cache's layout.
        path: Location of the document, for messages.

    Raises:
        CacheCorrupt: It is not JSON, or shape, type, chunks or codecs are not those of the plan.
    """
    try:
        metadata = json.loads(content)
        check_depth(metadata)
        codecs, keys = metadata["codecs"], metadata["chunk_key_encoding"]
        byte_order = (codecs[0].get("configuration") or {}).get("endian", "little")
        described = {
            "codecs": tuple(codec["name"] for codec in codecs),
            "zarr_format": metadata["zarr_format"],
            "node_type": metadata["node_type"],
            "shape": metadata["shape"],
            "chunks": metadata["chunk_grid"]["configuration"]["chunk_shape"],
            "chunk_grid": metadata["chunk_grid"]["name"],
            "data_type": metadata["data_type"],
            "keys": keys["name"],
            "separator": keys.get("configuration", {}).get("separator", "/"),
            "transformers": metadata.get("storage_transformers", []),
            "byte order": byte_order,
        }
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CacheCorrupt(f"{path}: not the metadata of an array ({error!r})") from None
    expected = {
        "codecs": _ZARR_CODECS[array.compression],
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape(identity)),
        "chunks": list(array.chunks(identity)),
        "chunk_grid": "regular",
        "data_type": array.dtype.name,
        "keys": "default",
        "separator": "/",
        "transformers": [],
        "byte order": "little",
    }
    for name, value in expected.items():
        if described[name] != value:
            raise CacheCorrupt(
                f"{path}: {name} is {str(described[name])[:200]}, and the plan of the cache"
                f" requires {value}"
            )


def decode_chunk(
    data: bytes, compression: Compression, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Rows:
    """Decode one chunk.

    Args:
        data: Content of the chunk's file.
        compression: Compression of the array.
        dtype: Element type of the array.
        shape: Shape of one whole chunk.

    Returns:
        Array of that shape, which may be read-only.

    Raises:
        CacheCorrupt: The bytes do not contain exactly such an array.
    """
    num_values = math.prod(shape)
    check_expansion(len(data), num_values * dtype.itemsize)
    content: bytes | memoryview = data
    if compression != "blosc":
        _check_crc32c(data)
    if compression == "zstd":
        content = memoryview(data)[:-_CRC_BYTES]
    return decompress(content, compression, dtype, num_values).reshape(shape)


def views_first(rows: Rows, view_axis: int) -> Rows:
    """Move the view axis to the front, in contiguous memory.

    Rows are copied a few at a time, so that each cache line is read once: NumPy's copy of 256 views
    with 16,643 coefficients took three times as long, as long as decoding them (docs/LOG.md).
    """
    if view_axis == 0:
        return rows
    num_views, after = rows.shape[view_axis], rows.shape[view_axis + 1 :]
    flat = rows.reshape(-1, num_views, *after)
    moved = np.empty((num_views, *flat.shape[:1], *after), rows.dtype)
    for start in range(0, len(flat), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        moved[:, part] = np.moveaxis(flat[part], 1, 0)
    return moved.reshape(num_views, *rows.shape[:view_axis], *after)


def _check_crc32c(data: bytes) -> None:
    """Compare a chunk with the crc32c at its end: four bytes, little-endian.

    The library accepts only ``bytes``, and a copy of the whole chunk costs more time than its
    checksum (docs/LOG.md), so it is copied in parts that fit a processor's cache.
    """
    end = len(data) - _CRC_BYTES
    crc = 0
    for start in range(0, end, _CRC_PART_BYTES):
        crc = google_crc32c.extend(crc, data[start : min(start + _CRC_PART_BYTES, end)])
    if end < 0 or crc.to_bytes(_CRC_BYTES, "little") != data[end:]:
        raise CacheCorrupt("its crc32c does not match its content")
