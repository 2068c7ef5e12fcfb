"""Packed views: all arrays of one view as one member of a tar.

Reading a member of a tar takes more time than decoding the arrays in it, so all arrays of a view
are in one member: small arrays uncompressed, planes of codecs compressed one by one. A view can be
read alone, as streaming requires, but compresses less well than a block. docs/cache-format.md
describes the layout.
"""

import struct
from collections.abc import Mapping, Sequence

import google_crc32c
import numpy as np

from scalekd.cache.forms.webdataset.form import PackedField
from scalekd.cache.layout import ArraySpec
from scalekd.codecs.compression import check_expansion, decompress
from scalekd.errors import CacheCorrupt
from scalekd.shapes import Rows

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
        self._raw = (source_hash, *(array for array in arrays if not array.per_block))
        self._coded = tuple(array for array in arrays if array.per_block)
        self._raw_bytes = sum(array.bytes_per_view for array in self._raw)
        self._sizes = struct.Struct(f"<{len(self._coded)}I")

    @property
    def fields(self) -> tuple[PackedField, ...]:
        """Fields of a packed view, for ``passes/fields.json``."""
        return tuple(
            PackedField(
                name=array.name,
                dtype=array.dtype.name,
                shape=array.shape_before + array.shape_after,
                coding="raw" if array.compression == "blosc" else array.compression,
            )
            for array in (*self._raw, *self._coded)
        )

    def pack(self, rows: Mapping[str, Rows]) -> list[bytes]:
        """Pack views.

        Args:
            rows: All arrays of the pass and ``source_hash`` by name, view axis first.
        """
        raw = [_little_endian(rows[array.name]) for array in self._raw]
        return [
            self._pack_one([column[view].tobytes() for column in raw], rows, view)
            for view in range(len(raw[0]))
        ]

    def _pack_one(self, raw: list[bytes], rows: Mapping[str, Rows], view: int) -> bytes:
        coded = [_code(array, rows[array.name][view]) for array in self._coded]
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
            names: Arrays to unpack, such as ``stage4/codes`` or ``source_hash``.

        Returns:
            New arrays by name, view axis first.

        Raises:
            CacheCorrupt: The bytes are not a packed view of this cache.
        """
        wanted = set(names)
        raw = [array for array in self._raw if array.name in wanted]
        coded = [array for array in self._coded if array.name in wanted]
        num_bytes = len(views) * sum(array.bytes_per_view for array in (*raw, *coded))
        num_stored = sum(len(view) for view in views)
        check_expansion(num_stored, num_bytes)
        columns = {
            array.name: np.empty((len(views), *array.shape_before, *array.shape_after), array.dtype)
            for array in (*raw, *coded)
        }
        for number, view in enumerate(views):
            self._unpack_one(bytes(view), number, columns)
        return columns

    def _unpack_one(self, data: bytes, number: int, columns: dict[str, Rows]) -> None:
        """Fill row ``number`` of every array of ``columns``."""
        at = _HEAD.size + self._raw_bytes + self._sizes.size
        if len(data) < at + _CRC_BYTES:
            raise CacheCorrupt(f"{len(data):,} bytes are too few for a packed view")
        content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if _crc(content) != crc:
            raise CacheCorrupt("its crc32c does not match its content")
        head = _HEAD.unpack_from(content)
        if head != (_MAGIC, _VERSION, len(self._coded), 0):
            raise CacheCorrupt(f"begins with {head}, which is not a packed view of this cache")
        sizes = self._sizes.unpack_from(content, at - self._sizes.size)
        if at + sum(sizes) != len(content):
            raise CacheCorrupt(f"its parts have {at + sum(sizes):,} bytes, it has {len(content):,}")
        offset = _HEAD.size
        for array in self._raw:
            if array.name in columns:
                values = np.frombuffer(
                    content, array.dtype.newbyteorder("<"), array.values_per_view, offset
                )
                columns[array.name][number] = values.reshape(columns[array.name].shape[1:])
            offset += array.bytes_per_view
        for array, size in zip(self._coded, sizes, strict=True):
            if array.name in columns:
                values = _decode(array, content[at : at + size])
                columns[array.name][number] = values.reshape(columns[array.name].shape[1:])
            at += size


def _code(array: ArraySpec, row: Rows) -> bytes:
    """Return the bytes of one array of one view: compressed, if that is smaller."""
    plain = _little_endian(np.asarray(row))
    coded = array.pack(plain.reshape(array.stored_shape(1)))
    return coded if len(coded) < plain.nbytes else plain.tobytes()


def _decode(array: ArraySpec, data: bytes) -> Rows:
    """Return the values of :func:`_code`, one-dimensional."""
    if len(data) == array.bytes_per_view:
        return np.frombuffer(data, array.dtype.newbyteorder("<"))
    try:
        return decompress(data, array.compression, array.dtype, array.values_per_view)
    except CacheCorrupt as error:
        raise CacheCorrupt(f"{array.name}: {error}") from None


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def _little_endian(rows: Rows) -> Rows:
    return np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
