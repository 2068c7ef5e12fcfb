"""Arrays of committed shards, whether or not the cache is complete."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from scalekd.cache.files import CommittedFiles, digest
from scalekd.cache.forms import ZarrArrays
from scalekd.cache.layout import (
    RECORDS_FOLDER,
    Layout,
    Unit,
    record_path,
)
from scalekd.cache.manifest import Plan, ShardRecord
from scalekd.cache.records import read_record
from scalekd.cache.store import unit_documents
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
        # A cache that is not complete has no manifest: the plan says what its documents hold.
        documents = unit_documents(layout, unit)
        expected = {path: digest(content) for path, content in documents.items()}
        self._files = CommittedFiles(storage, {**expected, **self.record.files})

    def rows(self, name: str, rows: range) -> np.ndarray[Any, Any]:
        """Read rows of an array, such as ``pixel_hash``.

        Raises:
            CacheCorrupt: A file is missing or is not the one committed.
        """
        unit, shard, layout = self._unit, self._shard, self._layout
        if isinstance(unit, int):
            reader = layout.form.reader(self._files, layout)
            return reader.read(unit, shard, self.record.num_rows, rows, [name])[name]
        array = next(array for array in layout.samples if array.name == name)
        start = shard * layout.identity.shard_size + rows.start
        return ZarrArrays(self._files, layout).rows(unit, array, start, len(rows))
