"""The index of a tar: the offset of each block and view, and the digest of each block.

With it a block is one request, checked against a digest of its own, and a single view or image
can be had without reading the tar's headers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from scalekd.cache.files import FileDigest
from scalekd.errors import CacheCorrupt

Rows = np.ndarray[Any, Any]

MAX_BYTES_PER_VIEW = 128
"""Bound on the bytes of an index per view: 32 of offsets, 48 of a block of one view, and room."""
MAX_HEADER_BYTES = 4096


@dataclass(frozen=True)
class ShardIndex:
    """Content of an index file.

    Attributes:
        blocks: int64 ``(block, 2)``: offset and bytes of each block.
        block_sha256: uint8 ``(block, 32)``.
        views: int64 ``(view, 4)``: offset and bytes of the image, both 0 without one, then of the
            packed view.
    """

    blocks: Rows
    block_sha256: Rows
    views: Rows

    def block(self, number: int) -> tuple[int, FileDigest]:
        """Return the offset of a block, and its size and SHA-256."""
        offset, num_bytes = self.blocks[number].tolist()
        sha256 = self.block_sha256[number].tobytes().hex()
        return offset, FileDigest(num_bytes=num_bytes, sha256=sha256)

    def to_bytes(self) -> bytes:
        arrays: dict[str, Rows] = {
            "blocks": np.ascontiguousarray(self.blocks, np.int64),
            "block_sha256": np.ascontiguousarray(self.block_sha256, np.uint8),
            "views": np.ascontiguousarray(self.views, np.int64),
        }
        return safetensors.numpy.save(arrays)

    @classmethod
    def from_bytes(
        cls, data: bytes, path: str, *, num_rows: int, block_size: int, tar_bytes: int
    ) -> "ShardIndex":
        """Read an index file.

        Args:
            data: Content of the file.
            path: Location of the file, for messages.
            num_rows: Number of views in the shard.
            block_size: Number of views in a block.
            tar_bytes: Size of the tar.

        Raises:
            CacheCorrupt: The file is not an index of such a tar.
        """
        num_blocks = -(-num_rows // block_size)
        shapes = {
            "blocks": ((num_blocks, 2), np.int64),
            "block_sha256": ((num_blocks, 32), np.uint8),
            "views": ((num_rows, 4), np.int64),
        }
        try:
            found = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CacheCorrupt(f"{path}: not a safetensors file ({error})") from None
        if {name: (rows.shape, rows.dtype.type) for name, rows in found.items()} != shapes:
            raise CacheCorrupt(f"{path}: no index of {num_rows:,} views in blocks of {block_size}")
        index = cls(**found)
        index._check_places(path, block_size, tar_bytes)
        return index

    def _check_places(self, path: str, block_size: int, tar_bytes: int) -> None:
        """Blocks follow one another from the start of the tar; members lie in their block."""
        starts, sizes = self.blocks[:, 0], self.blocks[:, 1]
        ends = starts + sizes
        # Bounded one by one first, so that no sum overflows.
        bounded = ((self.blocks >= 0) & (self.blocks <= tar_bytes)).all() and (sizes > 0).all()
        follow = starts[0] == 0 and (starts[1:] == ends[:-1]).all() and ends[-1] <= tar_bytes
        if not (bounded and follow):
            raise CacheCorrupt(f"{path}: its blocks do not follow one another inside the tar")
        block = np.arange(len(self.views)) // block_size
        for column in (0, 2):
            first, length = self.views[:, column], self.views[:, column + 1]
            absent = (first == 0) & (length == 0)
            inside = (first >= starts[block]) & (length > 0) & (length <= ends[block] - first)
            if not (inside | (absent if column == 0 else False)).all():
                raise CacheCorrupt(f"{path}: a member lies outside its block")
