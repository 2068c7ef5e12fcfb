"""Read blocks of tars: one request per block, whose digest is checked before it is used."""

from collections.abc import Iterable

import numpy as np

from scalekd.cache.files import CommittedFiles
from scalekd.cache.forms.base import IMAGE, PassReader
from scalekd.cache.forms.webdataset.form import index_path, tar_path
from scalekd.cache.forms.webdataset.index import MAX_BYTES_PER_VIEW, MAX_HEADER_BYTES, ShardIndex
from scalekd.cache.forms.webdataset.packing import ViewPacking
from scalekd.cache.layout import Layout
from scalekd.errors import CacheCorrupt
from scalekd.shapes import Rows


class TarReader(PassReader):
    """Reads the passes of a cache in WebDataset form.

    Args:
        files: Committed files of the cache, which include those of the shards that are read.
        layout: Layout of the cache.
    """

    def __init__(self, files: CommittedFiles, layout: Layout) -> None:
        self._files = files
        self._block_size = layout.identity.block_size
        self._packing = ViewPacking(layout.views)
        self._indexes: dict[tuple[int, int], ShardIndex] = {}

    def read(
        self,
        pass_index: int,
        shard: int,
        num_rows: int,
        rows: range,
        names: Iterable[str],
    ) -> dict[str, Rows]:
        """See :meth:`PassReader.read`; whole blocks are read."""
        names = list(names)
        index = self.index(pass_index, shard, num_rows)
        size = self._block_size
        parts = [
            self._block(
                tar_path(pass_index, shard),
                index,
                number,
                range(max(rows.start, number * size), min(rows.stop, (number + 1) * size)),
                names,
            )
            for number in range(rows.start // size, -(-rows.stop // size))
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _block(
        self, tar: str, index: ShardIndex, number: int, rows: range, names: list[str]
    ) -> dict[str, Rows]:
        offset, expected = index.block(number)
        content = memoryview(self._files.read_range(tar, offset, expected))
        ranges = index.views[rows.start : rows.stop].tolist()
        packed = [content[at - offset : at - offset + size] for _, _, at, size in ranges]
        try:
            arrays = self._packing.unpack(packed, names)
        except CacheCorrupt as error:
            # The bytes are the committed ones, so the writer committed an invalid view.
            raise CacheCorrupt(
                f"{self._files.storage.locate(tar)}, block {number}: {error}"
            ) from None
        if IMAGE in names:
            arrays[IMAGE] = np.empty(len(ranges), object)
            arrays[IMAGE][:] = [
                bytes(content[at - offset : at - offset + size]) for at, size, _, _ in ranges
            ]
        return arrays

    def image_ranges(self, pass_index: int, shard: int, num_rows: int) -> tuple[str, Rows]:
        index = self.index(pass_index, shard, num_rows)
        return tar_path(pass_index, shard), index.views[:, :2]

    def index(self, pass_index: int, shard: int, num_rows: int) -> ShardIndex:
        """Return the index of a tar, which is read once."""
        index = self._indexes.get((pass_index, shard))
        if index is None:
            path = index_path(pass_index, shard)
            limit = MAX_HEADER_BYTES + num_rows * MAX_BYTES_PER_VIEW
            index = ShardIndex.from_bytes(
                self._files.read(path, max_bytes=limit),
                self._files.storage.locate(path),
                num_rows=num_rows,
                block_size=self._block_size,
                tar_bytes=self._files.digest_of(tar_path(pass_index, shard)).num_bytes,
            )
            self._indexes[pass_index, shard] = index
        return index
