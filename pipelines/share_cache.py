"""Sending a cache somewhere, or fetching one, or a part of one.

    scalekd cache push ./swin_l-cache s3://lab/swin_l
    scalekd cache pull s3://lab/swin_l ./swin_l-cache --passes 0-3 --logits-only

Only what is missing travels. Every file is held against its SHA-256 when it was read and when it
has arrived; the record of a shard follows its files, and the manifest comes last. So either command
may be stopped, run again, or run twice at once, and a cache that is still being written can be
fetched: what is committed comes now, and the rest when the command is run again.
"""

import shutil
import time
from collections.abc import Callable

from pydantic import BaseModel

from scalekd.cache.card import check_hub_limits, dataset_card
from scalekd.cache.extensions import begun_extensions, extension_path
from scalekd.cache.layout import PLAN_FILE
from scalekd.cache.selection import (
    Selection,
    check_owner,
    read_selection,
    selection_lock,
    write_selection,
)
from scalekd.cache.source import SourceCache
from scalekd.cache.transfer import Tally, Transfer
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.pipelines._cache_options import ShareConfig
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._signals import terminable
from scalekd.storage import Storage, open_storage

Range = tuple[int, int]


class ShareResult(BaseModel):
    """What a push or pull did.

    Attributes:
        source, target: From where to where.
        complete: Whether all that was asked for stands at the target now.
        part: Which part of the cache stands there, when it is not all.
        num_shards: Shards looked at, of samples and passes.
        num_found: Of these, those that stood there already.
        num_files: Files that travelled.
        num_bytes: Their bytes.
        extensions: Extensions that were brought, too.
        seconds: Time taken.
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


@terminable()
def share_cache(config: ShareConfig) -> ShareResult:
    """Bring a cache, or the part asked for, from source to target.

    Raises:
        DataError: There is no cache at the source.
        UsageError: The cache does not hold what is asked for, or the target is no place for it.
        CacheError: Source and target disagree, or a file is damaged.
        EnvironmentFault: No room, no permission, no network.
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
        source=source.place,
        target=target.place,
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
    """Bring one cache; whether it is complete at the target, and which part of it stands there."""
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
        check_hub_limits(source.selected_files(asked), target.place)
    if not asked.is_all:
        _declare(target, asked)
    transfer.prepare()
    selection = read_selection(target)
    wanted = asked if selection is None else asked.joined(selection)

    def bring() -> None:
        title = f"{source_storage.place} to {target.place}"
        num_shards = len(source.selected(wanted))
        with ProgressReport(title, num_shards, "shards", aside=_speed(tally)) as progress:
            transfer.bring(wanted, lambda: progress.advance(1))

    bring()
    with selection_lock(target):
        # Another process may have widened the part meanwhile: the product of both is brought.
        current = read_selection(target)
        if current is not None and wanted.joined(current) != wanted:
            wanted = wanted.joined(current)
            bring()
        if current is not None and current != wanted:
            write_selection(target, wanted)
        complete = transfer.seal()
    if target.is_repository and not optional:
        card = dataset_card(source.plan, source.at_opening, target.place)
        target.commit("README.md", card.encode(), exclusive=True)  # its owner may edit it
    return complete, wanted


def _declare(target: Storage, asked: Selection) -> None:
    """Say that a part is to stand here, before anything of it does: records of it name more.

    Raises:
        UsageError: A whole cache stands or was begun here, which a part would break.
    """
    with selection_lock(target, create=not target.exists(PLAN_FILE)):
        selection = read_selection(target)
        if selection is None and target.exists(PLAN_FILE):
            raise UsageError(
                f"{target.place}: a whole cache is or was begun there; bring all of it up to date,"
                " or the part to another place"
            )
        check_owner(target, selection, asked.cache_id)
        if selection is None:
            write_selection(target, asked)


def _asked(config: ShareConfig, source: SourceCache, *, optional: bool) -> Selection:
    """The part that was asked for, held against what the source has.

    Args:
        config: What was asked.
        source: Where it is to come from.
        optional: Take what there is of it, as from an extension.
    """
    identity, place = source.plan.identity, source.storage.place
    whole = source.selection.is_all
    groups = tuple(f"stage{stage}" for stage in identity.stages)
    groups += ("logits",) if identity.logits else ()
    targets = None
    if config.logits_only and config.stages is not None:
        raise UsageError("--logits-only takes no stage: leave out --stages")
    if config.logits_only or config.stages is not None:
        wanted = () if config.logits_only else config.stages or ()
        targets = tuple(f"stage{stage}" for stage in wanted) + ("logits",) * bool(identity.logits)
        if not source.form.separates_targets:
            raise UsageError(
                f"{place}: is in WebDataset form, which packs all targets of a view together; take"
                " --passes or --shards of it, or a cache in Zarr form"
            )
        lacking = sorted(set(targets) - set(groups))
        if lacking and not optional:
            raise UsageError(f"{place}: holds {', '.join(groups)}, and no {', '.join(lacking)}")
        if config.logits_only and identity.logits is None and not optional:
            raise UsageError(f"{place}: holds no logits; --logits-only would leave nothing")
        targets = tuple(sorted(group for group in groups if group in targets))
        targets = None if whole and targets == tuple(sorted(groups)) else targets
    last_pass = source.at_opening.num_passes - 1 if source.at_opening else 9_999
    passes = _within(config.passes, last_pass, "passes", place, optional)
    shards = _within(config.shards, identity.num_shards - 1, "shards", place, optional)
    if whole:  # all of something may grow with the cache
        passes = None if passes == ((0, last_pass),) else passes
        shards = None if shards == ((0, identity.num_shards - 1),) else shards
    asked = Selection(
        cache_id=source.plan.cache_id,
        passes=passes,
        shards=shards,
        targets=targets,  # type: ignore[arg-type]  # names of groups, as the plan has them
    )
    part = source.selection
    if whole:
        return asked
    if asked.is_all:
        return part
    if part.joined(asked) != part:
        raise UsageError(f"{place}: is a part itself, {part}, and {asked} is asked for")
    return asked


def _within(
    asked: Range | None, last: int, what: str, place: str, optional: bool
) -> tuple[Range, ...] | None:
    if asked is None:
        return None
    first, end = asked
    if optional:
        return ((first, min(end, last)),) if first <= last else ()
    if not 0 <= first <= end <= last:
        raise UsageError(f"--{what} {first}-{end}: {place} has {what} 0 to {last}")
    return (asked,)


def _check_space(source: SourceCache, target: Storage, asked: Selection) -> None:
    """Refuse to begin what cannot fit on a disk of this machine; a part's size nobody knows."""
    if source.at_opening is None or not asked.is_all or target.root is None:
        return
    root = target.root.absolute()
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    there = sum(stored.size for stored in target.list())
    free, needed = shutil.disk_usage(place).free, source.at_opening.total_bytes - there
    if needed > free:
        raise EnvironmentFault(
            f"{target.place}: {free / 1e9:,.1f} GB are free, and {needed / 1e9:,.1f} GB are to"
            " come; free space, or fetch a part (--passes, --stages, --shards, --logits-only)"
        )


def _speed(tally: Tally) -> Callable[[], str]:
    """Bytes so far and in a second, for the line of progress."""
    started, before = time.monotonic(), tally.num_bytes

    def told() -> str:
        rate = (tally.num_bytes - before) / max(time.monotonic() - started, 1e-9)
        return f"{tally.num_bytes / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"

    return told
