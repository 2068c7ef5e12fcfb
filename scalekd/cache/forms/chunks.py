"""From a file of a cache to an array: what the bytes claim is checked before memory is taken.

Writing goes through zarr-python. Reading does not, because a reader of untrusted files wants less:
zarr builds whatever codecs a metadata document names, and numcodecs' decoders allocate what the
compressed bytes ask for (10 KB of pcodec may ask for 100 GB). Format 1 has three codings, and
each is decoded here into an array whose shape and type the plan gave.
"""

import json
import math
from collections.abc import Callable
from typing import Any, Literal

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd
from pcodec import standalone

from scalekd.cache.documents import check_depth
from scalekd.cache.documents.manifest import Identity
from scalekd.cache.layout import ArraySpec
from scalekd.errors import CacheCorrupt

Rows = np.ndarray[Any, Any]
Coding = Literal["blosc", "zstd", "pcodec"]

MAX_METADATA_BYTES = 64 << 10
"""Of a ``zarr.json``; real ones have less than one kilobyte."""
MAX_EXPANSION = 4096
"""A file may decode to so many times its size…"""
FREE_EXPANSION_BYTES = 64 << 20
"""…or to this many bytes, whatever its size: blocks of equal values are small files."""

_ROWS_AT_ONCE = 64  # of int16: two cache lines of every view; 32 to 128 are within a quarter

_CODINGS: dict[tuple[str, ...], Coding] = {
    ("bytes", "blosc"): "blosc",
    ("bytes", "zstd", "crc32c"): "zstd",
    ("numcodecs.pcodec", "crc32c"): "pcodec",
}
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CRC_BYTES = 4
_CRC_PART_BYTES = 64 << 10
_BLOSC_HEADER_BYTES = 16
_BLOSC_FLAGS = (0b1000_0000, 0b1001_0011)
"""zstd inside; besides it byte shuffle, stored as it is, blocks not split."""


def coding_of(array: ArraySpec) -> tuple[str, ...]:
    """Names of the Zarr codecs that the layout gives an array, in order."""
    serializer = array.codecs.get("serializer")
    compressors = array.codecs["compressors"]
    chain = compressors if isinstance(compressors, tuple) else (compressors,)
    first = "bytes" if serializer is None else serializer.to_dict()["name"]
    return (first, *(codec.to_dict()["name"] for codec in chain))


def check_metadata(content: bytes, identity: Identity, array: ArraySpec, path: str) -> Coding:
    """Check that a ``zarr.json`` describes the array that the plan describes.

    Args:
        content: Of the document, read against its digest.
        identity: Of the cache.
        array: Of its layout.
        path: Of the document, for messages.

    Returns:
        How its chunks are coded.

    Raises:
        CacheCorrupt: It is no JSON, or shape, type, chunks or codecs are not those of the plan.
    """
    try:
        found = json.loads(content)
        check_depth(found)
        codecs = found["codecs"]
        names = tuple(codec["name"] for codec in codecs)
        byte_order = (codecs[0].get("configuration") or {}).get("endian", "little")
        described = {
            "zarr_format": found["zarr_format"],
            "node_type": found["node_type"],
            "shape": found["shape"],
            "chunks": found["chunk_grid"]["configuration"]["chunk_shape"],
            "chunk_grid": found["chunk_grid"]["name"],
            "data_type": found["data_type"],
            "keys": found["chunk_key_encoding"]["name"],
            "separator": found["chunk_key_encoding"].get("configuration", {}).get("separator", "/"),
            "transformers": found.get("storage_transformers", []),
            "byte order": byte_order,
        }
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CacheCorrupt(f"{path}: not the metadata of an array ({error!r})") from None
    coding = coding_of(array)
    if names != coding:
        raise CacheCorrupt(
            f"{path}: coded with {str(names)[:200]}, which is not a codec of format 1 for this"
            f" array: the plan says {coding}"
        )
    expected = {
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
                f"{path}: {name} is {str(described[name])[:200]}; the plan says {value}"
            )
    return _CODINGS[coding]


def decode_chunk(data: bytes, coding: Coding, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Rows:
    """Decode one chunk.

    Args:
        data: Content of its file.
        coding: Of its array.
        dtype: Of its array.
        shape: Of one whole chunk.

    Raises:
        CacheCorrupt: The bytes hold anything but exactly such an array.
    """
    num_values = math.prod(shape)
    num_bytes = num_values * dtype.itemsize
    if num_bytes > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * len(data)):
        raise CacheCorrupt(
            f"{len(data):,} bytes stand for {num_bytes:,}: more than {MAX_EXPANSION} times as many"
        )
    if coding != "blosc":
        _check_crc32c(data)
    try:
        return _DECODERS[coding](data, dtype.newbyteorder("<"), num_values).reshape(shape)
    except (CacheCorrupt, KeyboardInterrupt, SystemExit):
        raise
    # Decoders in Rust and C raise what they please; pyo3's PanicException is no Exception.
    except BaseException as error:
        raise CacheCorrupt(f"does not decode ({str(error)[:200]})") from None


def views_first(rows: Rows, view_axis: int) -> Rows:
    """Move the view axis to the front, in contiguous memory.

    A few rows at a time, whose cache lines are then used whole: NumPy's own copy of 256 views of
    16,643 coefficients took three times as long, as long as decoding them (docs/LOG.md).
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
    """Hold a chunk against the crc32c that closes it: four bytes, little-endian.

    Part by part, each within a processor's cache: the library takes nothing but ``bytes``, and
    one copy of a whole chunk cost more than its checksum (docs/LOG.md).
    """
    end = len(data) - _CRC_BYTES
    found = 0
    for start in range(0, end, _CRC_PART_BYTES):
        found = google_crc32c.extend(found, data[start : min(start + _CRC_PART_BYTES, end)])
    if end < 0 or found.to_bytes(_CRC_BYTES, "little") != data[end:]:
        raise CacheCorrupt("its crc32c does not match its content")


def _decode_blosc(data: bytes, dtype: np.dtype[Any], num_values: int) -> Rows:
    """A Blosc 1 buffer; its header has 16 bytes."""
    if len(data) < _BLOSC_HEADER_BYTES:
        raise CacheCorrupt(f"{len(data)} bytes are no Blosc buffer")
    flags, typesize = data[2], data[3]
    content, block, total = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
    needed, allowed = _BLOSC_FLAGS
    if flags & needed != needed or flags & ~allowed or typesize != dtype.itemsize:
        raise CacheCorrupt(f"Blosc flags {flags:#04x} and type size {typesize} are not of format 1")
    if content != num_values * dtype.itemsize or total != len(data) or not 0 < block <= content:
        raise CacheCorrupt(
            f"a Blosc buffer of {total:,} bytes for {content:,} in blocks of {block:,};"
            f" {len(data):,} bytes for {num_values * dtype.itemsize:,} are expected"
        )
    return np.frombuffer(blosc.decompress(data), dtype)


def _decode_zstd(data: bytes, dtype: np.dtype[Any], num_values: int) -> Rows:
    found = zstd_content_size(data)
    if found != num_values * dtype.itemsize:
        raise CacheCorrupt(
            f"a zstd frame of {found} bytes; {num_values * dtype.itemsize:,} are expected"
        )
    return np.frombuffer(zstd.decompress(memoryview(data)[:-_CRC_BYTES]), dtype)


def zstd_content_size(data: bytes) -> int | None:
    """Size that the header of a zstd frame gives for its content (RFC 8878, section 3.1.1.1).

    Returns:
        Bytes; ``None`` when it gives none, needs a dictionary, or is no frame header.
    """
    if data[:4] != _ZSTD_MAGIC or len(data) < 5:
        return None
    descriptor = data[4]
    single_segment = descriptor >> 5 & 1
    if descriptor & 0b1011:  # dictionary, reserved bit
        return None
    start = 5 if single_segment else 6
    size = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    field = data[start : start + size]
    if not size or len(field) < size:
        return None
    return int.from_bytes(field, "little") + (256 if size == 2 else 0)


def _decode_pcodec(data: bytes, dtype: np.dtype[Any], num_values: int) -> Rows:
    """A standalone pcodec file, decoded into memory of the right size and no further.

    It ends itself, so that the crc32c behind it is not looked at.
    """
    rows = np.empty(num_values, dtype)
    progress = standalone.simple_decompress_into(data, rows)
    if progress.n_processed != num_values or not progress.finished:
        raise CacheCorrupt(f"pcodec data that hold not just {num_values:,} values")
    return rows


_DECODERS: dict[Coding, Callable[[bytes, np.dtype[Any], int], Rows]] = {
    "blosc": _decode_blosc,
    "zstd": _decode_zstd,
    "pcodec": _decode_pcodec,
}
