"""The index of a tar: the offset of each block and view, and the digest of each block.

With the index, a reader fetches a block with one request and checks its digest, and finds single
views and images without reading the headers of the tar.
"""

from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy

from scalekd.cache.files import FileDigest
from scalekd.errors import CacheCorrupt
from scalekd.shapes import Rows

MAX_BYTES_PER_VIEW = 128
"""Limit of an index per view: 32 bytes of offsets, 48 of a block of one view, and some margin."""
MAX_HEADER_BYTES = 4096


@dataclass(frozen=True)
class ShardIndex:
    """Content of an index file.

    Attributes:
        blocks: int64 ``(block, 2)``: offset and size of each block.
        block_sha256: uint8 ``(block, 32)``: SHA-256 of each block.
        views: int64 ``(view, 4)``: offset and size of the image, 0 if there is none; then offset
            and size of the packed view.
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
        """Return the content of the index file."""
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
            arrays = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CacheCorrupt(f"{path}: not a safetensors file ({error})") from None
        if {name: (rows.shape, rows.dtype.type) for name, rows in arrays.items()} != shapes:
            raise CacheCorrupt(
                f"{path}: not an index of {num_rows:,} views in blocks of {block_size}"
            )
        index = cls(**arrays)
        index._check_ranges(path, block_size, tar_bytes)
        return index

    def _check_ranges(self, path: str, block_size: int, tar_bytes: int) -> None:
        """Check that blocks follow one another from the tar's start, and contain their members."""
        starts, sizes = self.blocks[:, 0], self.blocks[:, 1]
        ends = starts + sizes
        # Each number is checked first, so that no sum overflows.
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
