"""Join the parts of one cache that were written on machines without a shared folder.

    scalekd cache merge ./from-a ./from-b --output ./swin_l-cache

All parts have the same plan, and each contains some of the shards or passes. Every file is read and
compared with its digest before it is linked or copied. Repeating the command continues after an
interruption and adds the shards that were committed to a part since.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from scalekd.cache.cache import Cache
from scalekd.cache.documents import MAX_JSON_BYTES
from scalekd.cache.documents.manifest import Plan
from scalekd.cache.documents.selection import Selection, ranges_of, refuse_part
from scalekd.cache.files import read_bounded
from scalekd.cache.layout import PLAN_FILE, SAMPLES, ShardId, Unit
from scalekd.cache.reading.committed import recorded_shards
from scalekd.cache.reading.extensions import extension_names, extension_path
from scalekd.cache.sharing.source import SourceCache
from scalekd.cache.sharing.transfer import Tally, Transfer
from scalekd.cache.writing.finishing import finish
from scalekd.cache.writing.planning import differences
from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.pipelines._progress import ProgressReport
from scalekd.signals import terminable
from scalekd.storage import LocalStorage
from scalekd.text import counted, format_bytes


class MergeResult(BaseModel):
    """Result of a merge.

    Attributes:
        output: Folder of the joined cache.
        complete: Whether the first pass is complete.
        num_passes: Number of complete passes, counted from the first.
        missing: Shards that no part contains, by unit, such as ``pass 1: 3-5``.
        num_files: Number of files linked or copied by this command.
        num_bytes: Total size of these files.
        num_found: Number of shards that the output already had.
        extensions: Results of merging the extensions, by name.
        seconds: Duration of the command.
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

    def lines(self) -> list[str]:
        """Return the lines to print."""
        state = f"{counted(self.num_passes, 'pass')} complete" if self.complete else "not complete"
        return [
            *(f"missing: {shards}" for shards in self.missing),
            f"{self.output}: {state}; {self.num_files:,} files, {format_bytes(self.num_bytes)} in"
            f" {self.seconds:,.1f} s; {self.num_found:,} shards existed already",
            *(
                f"extension {name}: {counted(inner.num_passes, 'pass')} complete"
                for name, inner in self.extensions.items()
            ),
        ]


@terminable()
def merge_caches(parts: Sequence[Path], output: Path, *, copy: bool = False) -> MergeResult:
    """Join parts of one cache in a new folder, or continue a merge; the parts are not changed.

    Args:
        parts: Folders of caches, complete or incomplete.
        output: Folder of the joined cache; it may contain an earlier merge of the parts.
        copy: Copy every file instead of making hard links.

    Raises:
        DataError: A part is not a cache.
        CacheMismatch: The parts are of different caches, or contain a shard with different bytes.
        CacheCorrupt: A file of a part is damaged.
        UsageError: A part contains only some of the targets, or ``output`` is one of the parts.
    """
    started = time.monotonic()
    if len({path.resolve() for path in (*parts, output)}) != len(parts) + 1:
        raise UsageError(f"--output {output}: the output and the parts must be different folders")
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
            transfer.copy(Selection(cache_id=plan.cache_id), lambda: progress.advance(1))
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
    """Return the plan common to all parts, with the provenance of the first."""
    if not sources:
        raise DataError("nothing to merge: name the folders of the parts")
    first = sources[0]
    for other in sources[1:]:
        if other.plan.cache_id != first.plan.cache_id:
            raise CacheMismatch(
                f"{other.storage.location} is not a part of the cache at {first.storage.location}:"
                f" {differences(first.plan.identity, other.plan.identity)}. Begin the cache on"
                " one machine, and copy its plan.json and tables/ to the others before they start"
            )
        ours, theirs = first.plan.provenance.licence, other.plan.provenance.licence
        if ours != theirs:
            raise CacheMismatch(
                f"{other.storage.location} states the licence {theirs or 'none'}, and"
                f" {first.storage.location} {ours or 'none'}: the licences must agree"
            )
    return first.plan


def _compare(sources: Sequence[SourceCache], shards: Sequence[list[ShardId]]) -> None:
    """Raise, before anything is written, if two parts contain a shard with different bytes."""
    owner: dict[ShardId, SourceCache] = {}
    for source, committed in zip(sources, shards, strict=True):
        for shard in committed:
            first, path = owner.setdefault(shard, source), shard.record_path
            if first is not source and _record(first, path) != _record(source, path):
                raise CacheMismatch(
                    f"{shard} has different bytes in {source.location} and in {first.location}: the"
                    " machines that wrote them round differently; give each its own --shards"
                )


def _record(source: SourceCache, path: str) -> bytes:
    return read_bounded(source.storage, path, max_bytes=MAX_JSON_BYTES, what="a commit record")


def _completeness(cache: Cache) -> tuple[int, tuple[str, ...]]:
    """Return the number of complete passes, counted from the first, and the missing shards."""
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
