"""Reading committed shards of a cache that may be incomplete."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from scalekd.cache.cache import Cache
from scalekd.cache.documents.manifest import ShardRecord
from scalekd.cache.files import CommittedFiles, digest
from scalekd.cache.forms import ZarrArrays
from scalekd.cache.layout import RECORDS_FOLDER, SAMPLES, ShardId
from scalekd.storage import Storage


def recorded_shards(storage: Storage, num_shards: int) -> Iterator[ShardId]:
    """Yield every shard with a commit record: samples first, then pass by pass.

    Raises:
        UsageError: The location cannot be listed.
    """
    recorded: list[ShardId] = []
    for stored in storage.list(RECORDS_FOLDER):
        unit, _, name = stored.path.removeprefix(f"{RECORDS_FOLDER}/").partition("/")
        number = name.removesuffix(".json")
        if not number.isdecimal() or int(number) >= num_shards:
            continue
        if unit == SAMPLES or unit.isdecimal():
            shard = ShardId(SAMPLES if unit == SAMPLES else int(unit), int(number))
            if stored.path == shard.record_path:
                recorded.append(shard)
    order = sorted(recorded, key=lambda s: (-1 if isinstance(s.unit, str) else s.unit, s.number))
    return iter(order)


class CommittedShard:
    """One committed shard of a pass or of the samples, whose files are checked when read.

    Args:
        cache: Cache of the shard.
        shard: The shard.

    Raises:
        CacheError: The commit record is missing, damaged, or of another cache.
    """

    def __init__(self, cache: Cache, shard: ShardId) -> None:
        self.record: ShardRecord = cache.record(shard)
        self._layout, self._shard = cache.layout, shard
        # Without a manifest, the documents of the arrays are derived from the plan.
        documents = cache.documents(shard.unit)
        expected = {path: digest(content) for path, content in documents.items()}
        self._files = CommittedFiles(cache.storage, {**expected, **self.record.files})

    def rows(self, name: str, rows: range) -> np.ndarray[Any, Any]:
        """Read rows of an array, such as ``pixel_hash``.

        Raises:
            CacheCorrupt: A file is missing or is not the one committed.
        """
        unit, number, layout = self._shard.unit, self._shard.number, self._layout
        if isinstance(unit, int):
            reader = layout.form.reader(self._files, layout)
            return reader.read(unit, number, self.record.num_rows, rows, [name])[name]
        array = next(array for array in layout.samples if array.name == name)
        start = number * layout.identity.shard_size + rows.start
        return ZarrArrays(self._files, layout).rows(unit, array, start, len(rows))
