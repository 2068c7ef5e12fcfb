"""One view as one member of a tar: small arrays as they are, planes of codecs coded one by one.

A member of a tar costs a reader far more than the arrays inside it, so everything that belongs to
a view stands in one. It can be read alone, which is what a stream needs; the price is that the
entropy coder sees one view at a time. docs/cache-format.md states the layout.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd
from pcodec import standalone

from scalekd.cache.forms.chunks import FREE_EXPANSION_BYTES, MAX_EXPANSION, zstd_content_size
from scalekd.cache.forms.webdataset.form import PackedField
from scalekd.cache.layout import ArraySpec
from scalekd.codecs import PlaneSpec
from scalekd.errors import CacheCorrupt

Rows = np.ndarray[Any, Any]

SOURCE_HASH = "source_hash"
_MAGIC = b"SKDV"
_VERSION = 1
_HEAD = struct.Struct("<4sBBH")  # magic, version, number of coded fields, zero
_CRC_BYTES = 4


class ViewPacking:
    """Packs the views of one cache, and unpacks them.

    Args:
        arrays: The arrays of a pass.
    """

    def __init__(self, arrays: Sequence[ArraySpec]) -> None:
        source_hash = ArraySpec(SOURCE_HASH, np.dtype(np.uint64))
        self._raw = (source_hash, *(array for array in arrays if array.plane is None))
        self._coded = tuple((array, array.plane) for array in arrays if array.plane is not None)
        self._raw_bytes = sum(array.bytes_per_view for array in self._raw)
        self._sizes = struct.Struct(f"<{len(self._coded)}I")

    @property
    def fields(self) -> tuple[PackedField, ...]:
        """What ``webdataset.json`` says of a packed view."""
        return tuple(
            PackedField(
                name=array.name,
                dtype=array.dtype.name,
                shape=array.before + array.after,
                coding=array.plane.compression if array.plane else "raw",
            )
            for array in (*self._raw, *(array for array, _ in self._coded))
        )

    def pack(self, rows: Mapping[str, Rows]) -> list[bytes]:
        """Pack views.

        Args:
            rows: Every array of the pass and ``source_hash``, view axis first.
        """
        raw = [_little_endian(rows[array.name]) for array in self._raw]
        return [
            self._pack_one([column[view].tobytes() for column in raw], rows, view)
            for view in range(len(raw[0]))
        ]

    def _pack_one(self, raw: list[bytes], rows: Mapping[str, Rows], view: int) -> bytes:
        coded = [_code(array, plane, rows[array.name][view]) for array, plane in self._coded]
        data = b"".join(
            [
                _HEAD.pack(_MAGIC, _VERSION, len(coded), 0),
                *raw,
                self._sizes.pack(*(len(part) for part in coded)),
                *coded,
            ]
        )
        return data + _crc(data)

    def unpack(self, views: Sequence[bytes | memoryview], names: Sequence[str]) -> dict[str, Rows]:
        """Unpack some arrays of several views.

        Args:
            views: Packed views.
            names: Arrays wanted, ``source_hash`` among them if it is.

        Returns:
            Array by name, view axis first, in memory of its own.

        Raises:
            CacheCorrupt: The bytes are not those of a packed view of this cache.
        """
        wanted = set(names)
        raw = [array for array in self._raw if array.name in wanted]
        coded = [array for array, _ in self._coded if array.name in wanted]
        num_bytes = len(views) * sum(array.bytes_per_view for array in (*raw, *coded))
        num_stored = sum(len(view) for view in views)
        if num_bytes > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * num_stored):
            raise CacheCorrupt(
                f"{num_stored:,} bytes stand for {num_bytes:,}: more than {MAX_EXPANSION} times as"
                " many"
            )
        found = {
            array.name: np.empty((len(views), *array.before, *array.after), array.dtype)
            for array in (*raw, *coded)
        }
        for number, view in enumerate(views):
            self._unpack_one(bytes(view), number, found)
        return found

    def _unpack_one(self, data: bytes, number: int, found: dict[str, Rows]) -> None:
        """Fill row ``number`` of every array of ``found``."""
        at = _HEAD.size + self._raw_bytes + self._sizes.size
        if len(data) < at + _CRC_BYTES:
            raise CacheCorrupt(f"{len(data):,} bytes are no packed view")
        content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if _crc(content) != crc:
            raise CacheCorrupt("its crc32c does not match its content")
        head = _HEAD.unpack_from(content)
        if head != (_MAGIC, _VERSION, len(self._coded), 0):
            raise CacheCorrupt(f"begins with {head}, which is no packed view of this cache")
        sizes = self._sizes.unpack_from(content, at - self._sizes.size)
        if at + sum(sizes) != len(content):
            raise CacheCorrupt(f"its parts have {at + sum(sizes):,} bytes, it has {len(content):,}")
        offset = _HEAD.size
        for array in self._raw:
            if array.name in found:
                values = np.frombuffer(
                    content, array.dtype.newbyteorder("<"), array.values_per_view, offset
                )
                found[array.name][number] = values.reshape(array.before + array.after)
            offset += array.bytes_per_view
        for (array, plane), size in zip(self._coded, sizes, strict=True):
            if array.name in found:
                rows = found[array.name][number : number + 1]
                _decode(plane, content[at : at + size], rows.reshape(-1))
            at += size


def _code(array: ArraySpec, plane: PlaneSpec, row: Rows) -> bytes:
    """One plane of one view: compressed, or as it is where that is no larger."""
    plain = _little_endian(np.asarray(row))
    coded = plane.pack(plain.reshape((*array.before, 1, *array.after)))
    return coded if len(coded) < plain.nbytes else plain.tobytes()


def _decode(plane: PlaneSpec, data: bytes, row: Rows) -> None:
    """Decode one plane of one view into ``row``, memory of the right size."""
    stored_type = row.dtype.newbyteorder("<")
    try:
        if len(data) == row.nbytes:
            row[:] = np.frombuffer(data, stored_type)
        elif plane.compression == "pcodec":
            progress = standalone.simple_decompress_into(data, row)
            if progress.n_processed != row.size or not progress.finished:
                raise CacheCorrupt(f"pcodec data that hold not just {row.size:,} values")
        else:
            if zstd_content_size(data) != row.nbytes:
                raise CacheCorrupt(f"a zstd frame of not {row.nbytes:,} bytes")
            row[:] = np.frombuffer(zstd.decompress(data), stored_type)
    except (KeyboardInterrupt, SystemExit):
        raise
    # Decoders in Rust and C raise what they please; pyo3's PanicException is no Exception.
    except BaseException as error:
        raise CacheCorrupt(f"{plane.name} does not decode ({str(error)[:200]})") from None


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def _little_endian(rows: Rows) -> Rows:
    return np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
