"""The tar members of the views of one block, in the order of the tar."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scalekd.cache.forms.webdataset.form import PACKED_EXTENSION
from scalekd.cache.forms.webdataset.tar import image_extension, member, member_stem
from scalekd.shapes import Rows


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
