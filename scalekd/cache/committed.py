"""Arrays of committed shards, whether or not the cache is complete."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from scalekd.cache.chunks import check_metadata, decode_chunk, views_first
from scalekd.cache.files import CommittedFiles
from scalekd.cache.layout import (
    RECORDS_FOLDER,
    SAMPLES,
    Layout,
    Unit,
    array_path,
    chunk_path,
    record_path,
)
from scalekd.cache.manifest import Plan, ShardRecord
from scalekd.cache.records import read_record
from scalekd.cache.store import unit_documents
from scalekd.cache.webdataset.reader import TarReader
from scalekd.errors import CacheCorrupt
from scalekd.storage import Storage


def committed_shards(storage: Storage, plan: Plan) -> Iterator[tuple[int, int]]:
    """Yield ``(pass, shard)`` of every commit record, in order of their paths."""
    paths = {file.path for file in storage.list(RECORDS_FOLDER)}
    for path in sorted(paths):
        _, unit, name = path.split("/") if path.count("/") == 2 else ("", "", "")
        number = name.removesuffix(".json")
        if unit.isdecimal() and number.isdecimal() and int(number) < plan.identity.num_shards:
            pass_index, shard = int(unit), int(number)
            if path == record_path(pass_index, shard):
                yield pass_index, shard


class CommittedShard:
    """One committed shard of a pass, or of the samples, read against its commit record.

    Args:
        storage: Where the cache is.
        plan: Plan of the cache.
        layout: Layout of the cache.
        unit: Number of the pass, or ``"samples"``.
        shard: Number of the shard.

    Raises:
        CacheError: Its record is missing, damaged, or of another cache.
    """

    def __init__(
        self, storage: Storage, plan: Plan, layout: Layout, unit: Unit, shard: int
    ) -> None:
        self.record: ShardRecord = read_record(storage, plan, layout, unit, shard)
        self._layout, self._unit, self._shard = layout, unit, shard
        self._files = CommittedFiles(storage, dict(self.record.files))

    def rows(self, name: str, rows: range) -> np.ndarray[Any, Any]:
        """Read rows of an array that has one chunk a shard, such as ``pixel_hash``.

        Raises:
            CacheCorrupt: A file is missing or is not the one committed.
        """
        unit, shard, identity = self._unit, self._shard, self._layout.identity
        if self._layout.form is not None and unit != SAMPLES:
            reader = TarReader(self._files, self._layout)
            return reader.read(int(unit), shard, self.record.num_rows, rows, [name])[name]
        array = next(array for array in self._layout.arrays(unit) if array.name == name)
        metadata = f"{array_path(unit, array)}/zarr.json"
        content = unit_documents(self._layout, unit)[metadata]
        coding = check_metadata(content, identity, array, metadata)
        path = chunk_path(unit, array, shard)
        try:
            chunk = decode_chunk(
                self._files.read(path), coding, array.dtype, array.chunks(identity)
            )
        except CacheCorrupt as error:
            raise CacheCorrupt(f"{self._files.storage.locate(path)}: {error}") from None
        return views_first(chunk, array.view_axis)[rows.start : rows.stop]
