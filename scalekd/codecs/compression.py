"""Decompress arrays of known size from untrusted bytes.

numcodecs' decoders allocate the size that the compressed bytes specify (10 KB of pcodec data may
specify 100 GB). Here the caller gives the number of values, and the size is checked first.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from scalekd.errors import CacheCorrupt
from scalekd.shapes import Rows

Compression = Literal["pcodec", "zstd", "blosc"]

MAX_EXPANSION = 4096
"""Largest ratio of decoded to stored size of arrays with more than ``FREE_EXPANSION_BYTES``."""
FREE_EXPANSION_BYTES = 64 << 20
"""Decoded size up to which any ratio is allowed: blocks of equal values are small files."""

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOSC_HEADER_BYTES = 16
_BLOSC_FLAGS = (0b1000_0000, 0b1001_0011)
"""Flags that must be set (zstd), and that may be set (byte shuffle, uncompressed, not split)."""


def check_expansion(num_stored: int, num_bytes: int) -> None:
    """Check that ``num_stored`` bytes of a file may decode to ``num_bytes``.

    Raises:
        CacheCorrupt: The ratio is larger than that of any array of a cache.
    """
    if num_bytes > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * num_stored):
        raise CacheCorrupt(
            f"{num_stored:,} bytes decode to {num_bytes:,}, more than {MAX_EXPANSION} times as many"
        )


def decompress(
    data: bytes | memoryview, compression: Compression, dtype: np.dtype[Any], num_values: int
) -> Rows:
    """Decompress an array of a known number of values.

    Args:
        data: Compressed bytes. Bytes after the end of pcodec data are ignored.
        compression: Compression of the bytes.
        dtype: Element type; values are little-endian.
        num_values: Number of values.

    Returns:
        One-dimensional array, which may be read-only.

    Raises:
        CacheCorrupt: The bytes are damaged, or do not contain exactly that many values.
    """
    stored_type = dtype.newbyteorder("<")
    try:
        return _DECODERS[compression](data, stored_type, num_values)
    except (CacheCorrupt, KeyboardInterrupt, SystemExit):
        raise
    # The Rust and C decoders raise many types, and pyo3's PanicException is not an Exception.
    except BaseException as error:
        raise CacheCorrupt(f"does not decode ({str(error)[:200]})") from None


def _pcodec(data: bytes | memoryview, dtype: np.dtype[Any], num_values: int) -> Rows:
    from pcodec import standalone

    values = np.empty(num_values, dtype)
    progress = standalone.simple_decompress_into(bytes(data), values)
    if progress.n_processed != num_values or not progress.finished:
        raise CacheCorrupt(f"pcodec data of not exactly {num_values:,} values")
    return values


def _zstd(data: bytes | memoryview, dtype: np.dtype[Any], num_values: int) -> Rows:
    from numcodecs import zstd

    size, expected = zstd_content_size(data), num_values * dtype.itemsize
    if size != expected:
        raise CacheCorrupt(f"a zstd frame of {size} bytes; {expected:,} are expected")
    values = np.empty(num_values, dtype)
    zstd.decompress(data, values)
    return values


def zstd_content_size(data: bytes | memoryview) -> int | None:
    """Return the size that the header of a zstd frame gives for its content.

    See RFC 8878, section 3.1.1.1.

    Returns:
        Bytes; ``None`` if the header gives no size, needs a dictionary, or is no frame header.
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


def _blosc(data: bytes | memoryview, dtype: np.dtype[Any], num_values: int) -> Rows:
    """Decompress a Blosc 1 buffer; its header has 16 bytes."""
    from numcodecs import blosc

    if len(data) < _BLOSC_HEADER_BYTES:
        raise CacheCorrupt(f"{len(data)} bytes are too few for a Blosc buffer")
    flags, typesize = data[2], data[3]
    content, block, total = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
    needed, allowed = _BLOSC_FLAGS
    if flags & needed != needed or flags & ~allowed or typesize != dtype.itemsize:
        raise CacheCorrupt(f"Blosc flags {flags:#04x} and type size {typesize} are not of format 1")
    expected = num_values * dtype.itemsize
    if content != expected or total != len(data) or not 0 < block <= content:
        raise CacheCorrupt(
            f"a Blosc buffer of {total:,} bytes for {content:,} in blocks of {block:,};"
            f" {len(data):,} bytes for {expected:,} are expected"
        )
    return np.frombuffer(blosc.decompress(data), dtype)


_DECODERS: dict[Compression, Callable[[bytes | memoryview, np.dtype[Any], int], Rows]] = {
    "pcodec": _pcodec,
    "zstd": _zstd,
    "blosc": _blosc,
}
