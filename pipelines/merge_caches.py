"""Joining the parts of one cache that were written apart, on machines that share no folder.

    scalekd cache merge ./from-a ./from-b --output ./swin_l-cache

The parts are one cache: begun by the same job, so that their plans agree, each with some of its
shards or passes. Every file is read and held against its digest before it is linked or copied.
The same command goes on after an interruption, and adds what a part has gained since.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from scalekd.cache.cache import Cache
from scalekd.cache.committed import recorded_shards
from scalekd.cache.documents import MAX_JSON_BYTES
from scalekd.cache.extensions import extension_names, extension_path
from scalekd.cache.files import read_bounded
from scalekd.cache.finishing import finish
from scalekd.cache.layout import PLAN_FILE, SAMPLES, ShardId, Unit
from scalekd.cache.manifest import Plan
from scalekd.cache.planning import differences
from scalekd.cache.selection import Selection, ranges_of, refuse_part
from scalekd.cache.source import SourceCache
from scalekd.cache.transfer import Tally, Transfer
from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._signals import terminable
from scalekd.storage import LocalStorage


class MergeResult(BaseModel):
    """What a merge did.

    Attributes:
        output: Folder of the joined cache.
        complete: Whether every shard of at least one pass, and of all before it, is there.
        num_passes: Passes that are complete.
        missing: Shards that no part has, by unit, such as ``pass 1: 3-5``.
        num_files: Files linked or copied now.
        num_bytes: Their bytes.
        num_found: Shards that stood already.
        extensions: What was joined below ``extensions/``, by name.
        seconds: Time taken.
    """

    output: str
    complete: bool
    num_passes: int
    missing: tuple[str, ...]
    num_files: int
    num_bytes: int
    num_found: int
    extensions: dict[str, "MergeResult"]
    seconds: float


@terminable()
def merge_caches(parts: Sequence[Path], output: Path, *, copy: bool = False) -> MergeResult:
    """Join parts of one cache in a new folder, or go on with it; the parts are left as they are.

    Args:
        parts: Folders of caches, complete or only begun.
        output: Folder of the joined cache; it may be one that was merged before.
        copy: Copy every file, also where a hard link would do.

    Raises:
        DataError: A part is no cache.
        CacheMismatch: The parts are of different caches, or hold a shard with different bytes.
        CacheCorrupt: A file of a part is damaged.
        UsageError: A part holds only some of the targets, or ``output`` is one of the parts.
    """
    started = time.monotonic()
    if len({path.resolve() for path in (*parts, output)}) != len(parts) + 1:
        raise UsageError(f"--output {output}: must be a folder of its own, and every part another")
    sources = [SourceCache(LocalStorage(path), committed=True) for path in parts]
    plan = _common_plan(sources)
    for source in sources:
        refuse_part(source.storage, "merged")
    shards = [source.selected(Selection(cache_id=plan.cache_id)) for source in sources]
    _compare(sources, shards)
    target, tally = LocalStorage(output), Tally()
    with ProgressReport("merging", sum(map(len, shards)), "shards") as progress:
        for source in sources:
            transfer = Transfer(source, target, plan=plan, link=not copy, tally=tally)
            transfer.prepare()
            transfer.bring(Selection(cache_id=plan.cache_id), lambda: progress.advance(1))
    merged = Cache(target, plan)
    num_passes, missing = _completeness(merged)
    if num_passes:
        finish(merged, num_passes)
    extensions = {}
    for name in sorted({name for s in sources for name in extension_names(s.storage)}):
        inner = extension_path(name)
        own = [part / inner for part in parts if (part / inner / PLAN_FILE).is_file()]
        if own:
            extensions[name] = merge_caches(own, output / inner, copy=copy)
    return MergeResult(
        output=str(output),
        complete=num_passes > 0,
        num_passes=num_passes,
        missing=missing,
        num_files=tally.num_files,
        num_bytes=tally.num_bytes,
        num_found=tally.num_found,
        extensions=extensions,
        seconds=time.monotonic() - started,
    )


def _common_plan(sources: Sequence[SourceCache]) -> Plan:
    """The plan of all; of facts that decide no byte, those of the first."""
    if not sources:
        raise DataError("nothing to merge: name the folders of the parts")
    first = sources[0]
    for other in sources[1:]:
        if other.plan.cache_id != first.plan.cache_id:
            raise CacheMismatch(
                f"{other.storage.place} is no part of the cache at {first.storage.place}:"
                f" {differences(first.plan.identity, other.plan.identity)}. Parts are begun once"
                " and copied: plan.json and tables/ of one machine, before the others start"
            )
        ours, theirs = first.plan.provenance.licence, other.plan.provenance.licence
        if ours != theirs:
            raise CacheMismatch(
                f"{other.storage.place} states the licence {theirs or 'none'}, and"
                f" {first.storage.place} {ours or 'none'}: nobody can tell which holds"
            )
    return first.plan


def _compare(sources: Sequence[SourceCache], shards: Sequence[list[ShardId]]) -> None:
    """Find two parts that hold a shard with different bytes, before anything is written."""
    owner: dict[ShardId, SourceCache] = {}
    for source, committed in zip(sources, shards, strict=True):
        for shard in committed:
            first, path = owner.setdefault(shard, source), shard.record_path
            if first is not source and _record(first, path) != _record(source, path):
                raise CacheMismatch(
                    f"{shard} has other bytes in {source.place} than in {first.place}: the"
                    " machines that wrote them do not compute alike; give each its own --shards"
                )


def _record(source: SourceCache, path: str) -> bytes:
    return read_bounded(source.storage, path, max_bytes=MAX_JSON_BYTES, what="a commit record")


def _completeness(cache: Cache) -> tuple[int, tuple[str, ...]]:
    """Passes that are complete, counted from the first, and the shards that are missing."""
    lacking: dict[Unit, list[int]] = {}
    recorded = recorded_shards(cache.storage, cache.identity.num_shards)
    num_begun = max((int(shard.unit) for shard in recorded if shard.unit != SAMPLES), default=0)
    for shard in cache.missing(cache.shards(num_begun + 1)):
        lacking.setdefault(shard.unit, []).append(shard.number)
    missing = []
    for unit, numbers in lacking.items():
        spelt = ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in ranges_of(numbers))
        missing.append(f"{'samples' if unit == SAMPLES else f'pass {unit}'}: {spelt}")
    if SAMPLES in lacking:
        return 0, tuple(missing)
    return min((int(unit) for unit in lacking), default=num_begun + 1), tuple(missing)
