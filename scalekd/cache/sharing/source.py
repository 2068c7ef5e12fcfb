"""A cache that is fetched from: what of it is committed, and the files of a selection."""

from collections.abc import Iterator

from scalekd.cache.cache import Cache, read_manifest_if_any
from scalekd.cache.documents.manifest import Plan
from scalekd.cache.documents.selection import Selection
from scalekd.cache.documents.stored import read_document
from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE, ShardId
from scalekd.cache.reading.committed import recorded_shards
from scalekd.cache.tables import table_files
from scalekd.errors import CacheMismatch, DataError
from scalekd.storage import Storage


class SourceCache(Cache):
    """A cache to be fetched from, complete or still growing.

    Attributes:
        at_opening: Its manifest when this was opened, if there was one.

    Args:
        storage: Where it is.
        committed: Take every shard that is committed, also of passes that are being added; not
            only those that the manifest names.

    Raises:
        DataError: There is no cache.
        CacheError: Plan or manifest are damaged.
    """

    def __init__(self, storage: Storage, *, committed: bool = False) -> None:
        self.at_opening = None if committed else read_manifest_if_any(storage)
        if self.at_opening is None and not storage.exists(PLAN_FILE):
            raise DataError(
                f"no cache at {storage.location}: neither {MANIFEST_FILE} nor {PLAN_FILE}"
            )
        plan = read_document(storage, PLAN_FILE, Plan, "the plan")
        if self.at_opening is not None and self.at_opening.plan != plan:
            raise CacheMismatch(f"{storage.location}: its plan is not the plan in its manifest")
        super().__init__(storage, plan)
        _ = self.selection  # a damaged one is reported before anything is brought

    def selected(self, selection: Selection) -> list[ShardId]:
        """What is committed of a selection: samples first, then pass by pass.

        Raises:
            UsageError: The cache is not complete, and the location cannot be listed.
        """
        if self.at_opening is not None:
            there = self.shards(self.at_opening.num_passes)
        else:
            there = recorded_shards(self.storage, self.identity.num_shards)
        return [
            shard
            for shard in there
            if selection.has_unit(shard.unit) and selection.has_shard(shard.number)
        ]

    def selected_files(self, selection: Selection) -> Iterator[str]:
        """Every file of a selection, by the layout; a few more where images were skipped."""
        yield from (PLAN_FILE, MANIFEST_FILE, *table_files(self.identity))
        if self.at_opening is not None:
            self.check_names(self.at_opening)
            yield from self.at_opening.files
        for shard in self.selected(selection):
            yield shard.record_path
            yield from filter(selection.has_file, self.files(shard))
