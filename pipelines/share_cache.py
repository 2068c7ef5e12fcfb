"""Copy a cache, or a part of one, to or from another storage location.

    scalekd cache push ./swin_l-cache s3://lab/swin_l
    scalekd cache pull s3://lab/swin_l ./swin_l-cache --passes 0-3 --logits-only

Only missing files are copied. The SHA-256 of every file is checked after reading and after writing.
A shard's record is written after its files, and the manifest is written last. Either command can
therefore be stopped, repeated, or run twice at the same time. A cache that is still being written
can be fetched: the shards committed so far are copied now, the others when the command is repeated.
"""

import shutil
import time
from collections.abc import Callable

from pydantic import BaseModel

from scalekd.cache.documents.selection import (
    Selection,
    check_owner,
    read_selection,
    selection_lock,
    write_selection,
)
from scalekd.cache.layout import PLAN_FILE
from scalekd.cache.reading.extensions import begun_extensions, extension_path
from scalekd.cache.sharing.card import check_hub_limits, dataset_card
from scalekd.cache.sharing.source import SourceCache
from scalekd.cache.sharing.transfer import Tally, Transfer
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.pipelines._cache_options import ShareConfig
from scalekd.pipelines._progress import ProgressReport
from scalekd.signals import terminable
from scalekd.storage import Storage, open_storage
from scalekd.text import format_bytes

Range = tuple[int, int]


class ShareResult(BaseModel):
    """Result of a push or pull.

    Attributes:
        source, target: Locations of the source cache and of the copy.
        complete: Whether the target now contains everything that was requested.
        part: Description of the part at the target; ``None`` when it is the whole cache.
        num_shards: Number of shards examined, of samples and passes.
        num_found: Number of examined shards that the target already had.
        num_files: Number of files copied.
        num_bytes: Total size of the copied files.
        extensions: Names of the extensions that were copied with the cache.
        seconds: Duration of the command.
    """

    source: str
    target: str
    complete: bool
    part: str | None
    num_shards: int
    num_found: int
    num_files: int
    num_bytes: int
    extensions: tuple[str, ...]
    seconds: float

    def lines(self) -> list[str]:
        """Return the lines to print."""
        state = f"a part: {self.part}" if self.part else "the whole cache"
        if not self.complete:
            state = "not complete, because the source is not: run the same command again later"
        rate = self.num_bytes / max(self.seconds, 1e-9)
        lines = [
            f"{self.target}: {state}",
            f"{self.num_files:,} files, {format_bytes(self.num_bytes)} in {self.seconds:,.1f} s,"
            f" {format_bytes(rate)}/s; {self.num_found:,} of {self.num_shards:,} shards existed"
            " already",
        ]
        if self.extensions:
            lines.append(f"with extensions {', '.join(self.extensions)}")
        return lines


@terminable()
def share_cache(config: ShareConfig) -> ShareResult:
    """Copy a cache, or the requested part of one, from source to target.

    Raises:
        DataError: There is no cache at the source.
        UsageError: The cache does not contain the requested part, or the target cannot receive it.
        CacheError: Source and target contain different caches, or a file is damaged.
        EnvironmentFault: The disk is full, permission is missing, or the network fails.
    """
    started = time.monotonic()
    source, target = open_storage(config.source), open_storage(config.target)
    tally = Tally()
    complete, part = _bring(config, source, target, tally)
    names = begun_extensions(source)
    for name in names:
        inner = extension_path(name)
        below = source.below(inner), target.below(inner)
        complete &= _bring(config, *below, tally, optional=True)[0]
    return ShareResult(
        source=source.location,
        target=target.location,
        complete=complete,
        part=None if part.is_all else str(part),
        num_shards=tally.num_shards,
        num_found=tally.num_found,
        num_files=tally.num_files,
        num_bytes=tally.num_bytes,
        extensions=tuple(names),
        seconds=time.monotonic() - started,
    )


def _bring(
    config: ShareConfig,
    source_storage: Storage,
    target: Storage,
    tally: Tally,
    *,
    optional: bool = False,
) -> tuple[bool, Selection]:
    """Copy one cache; return whether the target is complete, and the part that it contains."""
    source = SourceCache(source_storage)
    asked = _asked(config, source, optional=optional)
    transfer = Transfer(
        source,
        target,
        jobs=config.jobs,
        check=config.check,
        read_back=config.read_back,
        tally=tally,
    )
    _check_space(source, target, asked)
    if target.is_repository:
        check_hub_limits(source.selected_files(asked), target.location)
    if not asked.is_all:
        _declare(target, asked)
    transfer.prepare()
    selection = read_selection(target)
    wanted = asked if selection is None else asked.joined(selection)

    def bring() -> None:
        title = f"{source_storage.location} to {target.location}"
        num_shards = len(source.selected(wanted))
        with ProgressReport(title, num_shards, "shards", aside=_speed(tally)) as progress:
            transfer.copy(wanted, lambda: progress.advance(1))

    bring()
    with selection_lock(target):
        # Another process may have widened the part meanwhile: copy the union of both.
        current = read_selection(target)
        if current is not None and wanted.joined(current) != wanted:
            wanted = wanted.joined(current)
            bring()
        if current is not None and current != wanted:
            write_selection(target, wanted)
        complete = transfer.finish()
    if target.is_repository and not optional:
        card = dataset_card(source.plan, source.manifest_at_opening, target.location)
        target.commit("README.md", card.encode(), exclusive=True)  # its owner may edit it
    return complete, wanted


def _declare(target: Storage, asked: Selection) -> None:
    """Write the selection of a partial copy before its first file.

    A record of a partial copy names files that are never copied; the selection explains why.

    Raises:
        UsageError: The target contains a whole cache, complete or begun.
    """
    with selection_lock(target, create=not target.exists(PLAN_FILE)):
        selection = read_selection(target)
        if selection is None and target.exists(PLAN_FILE):
            raise UsageError(
                f"{target.location}: contains a whole cache, complete or begun; copy the whole"
                " cache there, or copy the part to another location"
            )
        check_owner(target, selection, asked.cache_id)
        if selection is None:
            write_selection(target, asked)


def _asked(config: ShareConfig, source: SourceCache, *, optional: bool) -> Selection:
    """Return the requested part, after checking that the source contains it.

    Args:
        config: Options of the command.
        source: Cache to copy from.
        optional: Accept a request that the source meets only partly, as for an extension.
    """
    identity, location = source.plan.identity, source.storage.location
    whole = source.selection.is_all
    groups = tuple(f"stage{stage}" for stage in identity.stages)
    groups += ("logits",) if identity.logits else ()
    targets = None
    if config.logits_only and config.stages is not None:
        raise UsageError("--logits-only excludes all stages: leave out --stages")
    if config.logits_only or config.stages is not None:
        wanted = () if config.logits_only else config.stages or ()
        targets = tuple(f"stage{stage}" for stage in wanted) + ("logits",) * bool(identity.logits)
        if not source.form.separates_targets:
            raise UsageError(
                f"{location}: is in WebDataset form, which packs all targets of a view together;"
                " use --passes or --shards, or a cache in Zarr form"
            )
        lacking = sorted(set(targets) - set(groups))
        if lacking and not optional:
            raise UsageError(
                f"{location}: contains {', '.join(groups)}, but not {', '.join(lacking)}"
            )
        if config.logits_only and identity.logits is None and not optional:
            raise UsageError(f"{location}: contains no logits, which --logits-only asks for")
        targets = tuple(sorted(group for group in groups if group in targets))
        targets = None if whole and targets == tuple(sorted(groups)) else targets
    last_pass = source.manifest_at_opening.num_passes - 1 if source.manifest_at_opening else 9_999
    passes = _within(config.passes, last_pass, "passes", location, optional)
    shards = _within(config.shards, identity.num_shards - 1, "shards", location, optional)
    if whole:  # a range that covers everything is stored as None: it grows with the cache
        passes = None if passes == ((0, last_pass),) else passes
        shards = None if shards == ((0, identity.num_shards - 1),) else shards
    asked = Selection(
        cache_id=source.plan.cache_id,
        passes=passes,
        shards=shards,
        targets=targets,  # type: ignore[arg-type]  # target names from the plan
    )
    part = source.selection
    if whole:
        return asked
    if asked.is_all:
        return part
    if part.joined(asked) != part:
        raise UsageError(f"{location}: is a partial copy ({part}), and the request is {asked}")
    return asked


def _within(
    asked: Range | None, last: int, what: str, location: str, optional: bool
) -> tuple[Range, ...] | None:
    if asked is None:
        return None
    first, end = asked
    if optional:
        return ((first, min(end, last)),) if first <= last else ()
    if not 0 <= first <= end <= last:
        raise UsageError(f"--{what} {first}-{end}: {location} has {what} 0 to {last}")
    return (asked,)


def _check_space(source: SourceCache, target: Storage, asked: Selection) -> None:
    """Raise if a whole cache does not fit on the local disk; the size of a part is unknown."""
    if source.manifest_at_opening is None or not asked.is_all or target.root is None:
        return
    root = target.root.absolute()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    there = sum(stored.size for stored in target.list())
    free, needed = shutil.disk_usage(existing).free, source.manifest_at_opening.total_bytes - there
    if needed > free:
        raise EnvironmentFault(
            f"{target.location}: {free / 1e9:,.1f} GB are free, and {needed / 1e9:,.1f} GB are"
            " needed; free space, or fetch a part (--passes, --stages, --shards, --logits-only)"
        )


def _speed(tally: Tally) -> Callable[[], str]:
    """Return a function that formats bytes copied and bytes per second for the progress line."""
    started, before = time.monotonic(), tally.num_bytes

    def text() -> str:
        rate = (tally.num_bytes - before) / max(time.monotonic() - started, 1e-9)
        return f"{tally.num_bytes / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"

    return text
