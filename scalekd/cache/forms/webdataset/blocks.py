"""Members of WebDataset tars: their names and bytes, and those of one block of views."""

import hashlib
import tarfile
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scalekd.cache.forms.webdataset.form import PACKED_EXTENSION
from scalekd.shapes import Rows

_BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * _BLOCK_BYTES)
_MAGIC = {b"\x89PNG": "png", b"BM": "bmp", b"P6": "ppm", b"II*\0": "tif", b"MM\0*": "tif"}


def member_stem(key: str) -> str:
    """Return the name of a sample's members, without extension.

    WebDataset takes the part of a name before the first dot as the key, but keys of image folders
    contain dots. The key is therefore percent-encoded, except letters, digits, ``_``, ``-``, ``~``
    and ``/``. ``urllib.parse.unquote`` returns the key.
    """
    quoted = urllib.parse.quote(key, safe="/~").replace(".", "%2E")
    return quoted if not quoted.startswith(("/", "_")) else f"%{ord(quoted[0]):02X}{quoted[1:]}"


def image_extension(image: bytes) -> str:
    """Return the extension for an encoded image, by its content."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "jpg")


def member(name: str, content: bytes) -> tuple[bytes, int]:
    """Return the bytes of a member in a tar, and the offset of its content in them."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = info.tobuf(tarfile.GNU_FORMAT)
    padding = bytes(-len(content) % _BLOCK_BYTES)
    return header + content + padding, len(header)


@dataclass(frozen=True)
class TarBlock:
    """The members of one block's views.

    Attributes:
        data: Bytes of the block in the tar.
        views: int64 ``(view, 4)`` as in :class:`ShardIndex`, with offsets from the block's start.
        sha256: SHA-256 of ``data``.
    """

    data: bytes
    views: Rows
    sha256: bytes


def make_block(
    keys: Sequence[str],
    labels: Rows,
    packed: Sequence[bytes],
    images: Sequence[bytes] | None,
) -> TarBlock:
    """Return the members of a block; those of a view are adjacent: image, label, packed view.

    Args:
        keys: Keys of the views.
        labels: Class numbers; views with -1 have no label.
        packed: Packed views.
        images: Encoded images, if they are embedded.
    """
    parts: list[bytes] = []
    ranges = np.zeros((len(keys), 4), np.int64)
    size = 0

    def add(name: str, content: bytes) -> tuple[int, int]:
        nonlocal size
        data, start = member(name, content)
        parts.append(data)
        span = size + start, len(content)
        size += len(data)
        return span

    for row, (key, label) in enumerate(zip(keys, labels.tolist(), strict=True)):
        stem = member_stem(key)
        if images is not None:
            ranges[row, :2] = add(f"{stem}.{image_extension(images[row])}", images[row])
        if label >= 0:
            add(f"{stem}.cls", str(label).encode())
        ranges[row, 2:] = add(f"{stem}.{PACKED_EXTENSION}", packed[row])
    data = b"".join(parts)
    return TarBlock(data, ranges, hashlib.sha256(data).digest())
