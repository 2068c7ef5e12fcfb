"""A tar while it is being written, in a temporary file until it is complete."""

import mmap
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scalekd.cache.files import MAX_FILE_BYTES
from scalekd.cache.forms.webdataset.blocks import END_OF_ARCHIVE, TarBlock
from scalekd.cache.forms.webdataset.index import ShardIndex
from scalekd.errors import UsageError

_MAX_TAR_BYTES = MAX_FILE_BYTES - len(END_OF_ARCHIVE)


class TarShardFile:
    """A tar in an unnamed temporary file, which disappears with its process, and its index.

    Attributes:
        num_bytes: Size of the appended blocks.

    Args:
        folder: Folder on a disk with room for the tar; the system's temporary folder if ``None``.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives longer than this call)
        self.num_bytes = 0
        self._ranges: list[tuple[int, int]] = []
        self._digests: list[bytes] = []
        self._views: list[np.ndarray[Any, Any]] = []

    def append(self, block: TarBlock) -> None:
        """Append the next block."""
        start = self.num_bytes
        if start + len(block.data) > _MAX_TAR_BYTES:
            raise UsageError(
                f"the tar of one shard would be larger than {_MAX_TAR_BYTES:,} bytes; pass a"
                " smaller --shard-size, or embed no images"
            )
        self._file.write(block.data)
        self.num_bytes += len(block.data)
        self._ranges.append((start, len(block.data)))
        self._digests.append(block.sha256)
        views = block.views.copy()
        views[:, 2] += start
        views[views[:, 1] > 0, 0] += start
        self._views.append(views)

    def close(self) -> tuple[memoryview, ShardIndex]:
        """Complete the tar; return its content, a memory map, and its index."""
        self._file.write(END_OF_ARCHIVE)
        self._file.flush()
        index = ShardIndex(
            blocks=np.array(self._ranges, np.int64),
            block_sha256=np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, 32),
            views=np.concatenate(self._views),
        )
        content = memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        self._file.close()
        return content, index

    def discard(self) -> None:
        """Delete a tar that will not be completed."""
        self._file.close()
