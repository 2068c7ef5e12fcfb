"""A cache that is copied from: its committed shards, and the files of a selection."""

from collections.abc import Iterator

from scalekd.cache.cache import Cache, read_manifest_if_any
from scalekd.cache.documents.manifest import Plan
from scalekd.cache.documents.selection import Selection
from scalekd.cache.documents.stored import read_document
from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE, ShardId
from scalekd.cache.reading.committed import recorded_shards
from scalekd.cache.reading.reader import check_folder
from scalekd.cache.tables import table_files
from scalekd.errors import CacheMismatch, DataError
from scalekd.storage import Storage


class SourceCache(Cache):
    """A cache to copy from, complete or still growing.

    Attributes:
        manifest_at_opening: Manifest when the cache was opened, if any; its shards are copied.

    Args:
        storage: Storage of the cache.
        committed: Ignore the manifest and copy all committed shards, also of incomplete passes.

    Raises:
        DataError: The location does not contain a cache.
        CacheError: Plan or manifest are damaged.
    """

    def __init__(self, storage: Storage, *, committed: bool = False) -> None:
        self.manifest_at_opening = None if committed else read_manifest_if_any(storage)
        if self.manifest_at_opening is None and not storage.exists(PLAN_FILE):
            check_folder(storage)
            raise DataError(
                f"no cache at {storage.location}: neither {MANIFEST_FILE} nor {PLAN_FILE}"
            )
        plan = read_document(storage, PLAN_FILE, Plan, "the plan")
        if self.manifest_at_opening is not None and self.manifest_at_opening.plan != plan:
            raise CacheMismatch(f"{storage.location}: its plan is not the plan in its manifest")
        super().__init__(storage, plan)
        _ = self.selection  # a damaged one is reported before anything is copied

    def selected(self, selection: Selection) -> list[ShardId]:
        """Return the committed shards of a selection: samples first, then pass by pass.

        Raises:
            UsageError: The cache is not complete, and the location cannot be listed.
        """
        if self.manifest_at_opening is not None:
            shards = self.shards(self.manifest_at_opening.num_passes)
        else:
            shards = recorded_shards(self.storage, self.identity.num_shards)
        return [
            shard
            for shard in shards
            if selection.has_unit(shard.unit) and selection.has_shard(shard.number)
        ]

    def selected_files(self, selection: Selection) -> Iterator[str]:
        """Yield the paths of a selection's files, as if no image had been skipped."""
        yield from (PLAN_FILE, MANIFEST_FILE, *table_files(self.identity))
        if self.manifest_at_opening is not None:
            self.check_names(self.manifest_at_opening)
            yield from self.manifest_at_opening.files
        for shard in self.selected(selection):
            yield shard.record_path
            yield from filter(selection.has_file, self.files(shard))
