"""Repair a damaged cache: damaged and missing files are written again with the same bytes.

    scalekd cache repair ./swin_l-cache --data-dir /imagenet

Files are first written to a work folder and compared with the surviving digests: those in the plan
for tail, tables and witnesses, those in the commit record or the manifest for shards. If this
machine does not reproduce the bytes, the cache is left unchanged.
"""

import shutil
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel

from scalekd.cache.cache import Cache
from scalekd.cache.care.repair import (
    DamagedCache,
    ShardDamage,
    damaged_documents,
    damaged_form,
    damaged_shards,
    intact_record,
    open_damaged,
    record_from_files,
    record_in_manifest,
    remove_damaged_manifest,
    remove_unexpected,
    write_file,
)
from scalekd.cache.care.verify import verify
from scalekd.cache.codecs import save_arrays
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Plan, ShardRecord
from scalekd.cache.documents.selection import refuse_part
from scalekd.cache.files import holds
from scalekd.cache.forms.webdataset.form import INFO_FILE
from scalekd.cache.layout import MANIFEST_FILE, SAMPLES, ShardId, unit_path
from scalekd.cache.tables import table_files
from scalekd.cache.writing.finishing import finish
from scalekd.cache.writing.lease import Leases, remove_settled
from scalekd.cache.writing.planning import begin_arrays, commit_plan
from scalekd.cache.writing.rows import SampleRows
from scalekd.cache.writing.writer import CacheWriter
from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.loading.drawing import DrawnViews, drawn_samples
from scalekd.pipelines._arithmetic import compute_environment, default_device, strict_float32
from scalekd.pipelines._calibrate import NUM_WITNESSES, calibrate
from scalekd.pipelines._job import Job, views_of
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._same_pixels import changed_versions, check_pixels, draw_witnesses
from scalekd.pipelines._source_options import CacheSources, RepairConfig
from scalekd.pipelines._sources import open_source, select_images
from scalekd.pipelines._teacher_stream import EncoderName
from scalekd.pipelines._write_shards import write_claimed
from scalekd.signals import terminable
from scalekd.storage import LocalStorage, open_storage
from scalekd.storage.files import remove_abandoned, temporary_path
from scalekd.training.compilation import check_backend


class RepairResult(BaseModel):
    """Result of a repair.

    Attributes:
        path: Folder of the cache.
        sound: Whether the cache has no problems after the repair.
        mended: Files written, as paths inside the cache.
        shards_redone: ``(unit, shard)`` pairs that were drawn and run through the teacher again.
        removed: Unexpected files that were deleted.
        problems: Remaining problems, such as unexpected files that were kept.
        seconds: Duration of the command.
    """

    path: str
    sound: bool
    mended: tuple[str, ...]
    shards_redone: tuple[tuple[str, int], ...]
    removed: tuple[str, ...]
    problems: tuple[str, ...]
    seconds: float

    def lines(self) -> list[str]:
        """Return the lines to print."""
        return [
            *(f"repaired: {path}" for path in self.mended),
            *(f"removed: {path}" for path in self.removed),
            *(f"still wrong: {problem}" for problem in self.problems),
            f"{self.path}: {len(self.mended)} files repaired, {len(self.shards_redone)} shards"
            f" computed again, {len(self.removed)} unexpected files removed,"
            f" in {self.seconds:,.1f} s",
        ]

    def failure(self) -> CacheCorrupt | None:
        """Return the error that the remaining problems amount to; ``None`` for a sound cache."""
        if self.sound:
            return None
        return CacheCorrupt(
            f"{self.path}: {self.problems[0]}; pass --remove-extra to delete what does not"
            " belong to the cache"
        )


class _Maker:
    """Draws the views of the cache and runs its teacher; both are opened when first needed."""

    def __init__(self, sources: CacheSources, cache: Cache) -> None:
        self._sources, self._cache = sources, cache

    @cached_property
    def drawn(self) -> DrawnViews:
        opened = open_source(self._sources)
        images = select_images(self._sources, opened, self._cache.identity.data)
        return views_of(self._cache, images)

    @cached_property
    def job(self) -> Job:
        return Job.of(self._cache, self._sources, drawn=self.drawn).to(default_device())

    def compiled_job(self, compiler: str | None) -> Job:
        """Return the job, its teacher compiled with a ``torch.compile`` backend if one is given."""
        if compiler is None:
            return self.job
        check_backend(compiler)
        self.job.teacher.compile(backend=compiler)
        return replace(self.job, compiler=compiler)


@terminable()
@strict_float32()
def repair_cache(config: RepairConfig) -> RepairResult:
    """Restore the committed files of a cache.

    Raises:
        DataError: The cache or the images do not exist.
        CacheError: No document describes the cache; or the data set, teacher or machine differ from
            those that wrote the cache, and give other bytes.
        UsageError: Images are needed, and ``data_dir`` is not given.
    """
    started = time.monotonic()
    root = open_storage(config.cache).root
    if root is None:
        raise UsageError(
            f"{config.cache}: only a folder can be repaired in place; fetch it with `scalekd cache"
            " pull`, repair it, and send it back with `scalekd cache push --check`"
        )
    damaged = open_damaged(root)
    refuse_part(LocalStorage(root), "repaired")
    remove_abandoned(root)
    maker = _Maker(config, damaged.cache)
    mended, redone = [], []
    for relative, content in damaged_form(damaged).items():
        write_file(root, relative, content)
        mended.append(relative)
    with temporary_path(root / "repair") as scratch:  # on a disk that has room for a shard
        mended += _mend_tables(root, damaged, maker, scratch)
        for relative, content in damaged_documents(damaged).items():
            write_file(root, relative, content)
            mended.append(relative)
        with Leases(root) as leases:
            for damage in damaged_shards(damaged):
                written, again = _mend_shard(root, damaged, maker, scratch, leases, damage)
                mended += written
                if again:
                    redone.append((str(damage.shard.unit), damage.shard.number))
    remove_settled(root)
    before = {path: _content(root / path) for path in (INFO_FILE, MANIFEST_FILE)}
    remove_damaged_manifest(damaged)
    finish(damaged.cache, damaged.num_passes)
    mended += [path for path, content in before.items() if content != _content(root / path)]
    removed = []
    findings = verify(root, quick=True)
    if config.remove_extra and findings.unexpected:
        for path in findings.unexpected:
            remove_unexpected(path)
            removed.append(path.relative_to(root).as_posix())
        findings = verify(root, quick=True)
    return RepairResult(
        path=str(root),
        sound=not findings.problems,
        mended=tuple(mended),
        shards_redone=tuple(redone),
        removed=tuple(removed),
        problems=tuple(findings.problems),
        seconds=time.monotonic() - started,
    )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _mend_tables(root: Path, damaged: DamagedCache, maker: _Maker, scratch: Path) -> list[str]:
    """Write damaged tables again: tail, witnesses and codec tables; return their paths."""
    identity = damaged.plan.identity
    expected = table_files(identity)
    lost = [path for path, d in expected.items() if not damaged.cache.holds(path, d)]
    if not lost:
        return []
    if lost == [identity.views.witnesses]:
        pixels = draw_witnesses(maker.drawn, at_most=NUM_WITNESSES)
        save_arrays(scratch, "witnesses", {"pixels": pixels})
    else:
        calibrate(maker.job, scratch, keep_tail=identity.tail is not None)
    for path in lost:
        if not holds(LocalStorage(scratch), path, expected[path]):
            raise CacheMismatch(
                f"{root / path}: computed again, it is not the file that was committed;"
                f" {_why(damaged.plan, None, maker)}"
            )
        write_file(root, path, (scratch / path).read_bytes())
    return lost


def _why(plan: Plan, record: ShardRecord | None, maker: _Maker) -> str:
    """Explain why this machine may produce other bytes."""
    changed = changed_versions(plan.identity.views.environment)
    if changed:
        versions = ", ".join(changed)
        return f"the cache was written with other versions ({versions}): repair it with those"
    there = _computed_there(plan, record)
    here = compute_environment(default_device(), _encoder(there), there.get("compiler"))
    other = [
        f"{name} {there[name]} there, {here.get(name, 'none')} here"
        for name in sorted(there)
        if there[name] != here.get(name)
    ]
    if other:
        facts = ", ".join(other)
        return f"the targets were computed otherwise ({facts}): repair it on such a machine"
    return (
        "the processor or the version of torch computes otherwise here (`scalekd cache info` names"
        " the versions): repair on a machine like the one that wrote the cache"
    )


def _computed_there(plan: Plan, record: ShardRecord | None) -> dict[str, str]:
    """Return the recorded facts about the machine that computed a shard; empty if unknown."""
    return (record and record.computed) or plan.provenance.computed or {}


def _encoder(computed: dict[str, str]) -> EncoderName:
    """Return the implementation that encoded the features; older releases had only NumPy's."""
    return "torch" if computed.get("encoder") == "torch" else "numpy"


def _mend_shard(
    root: Path,
    damaged: DamagedCache,
    maker: _Maker,
    scratch: Path,
    leases: Leases,
    damage: ShardDamage,
) -> tuple[list[str], bool]:
    """Repair a shard; return the files written, and whether the shard was drawn again."""
    shard = damage.shard
    holder = leases.acquire(shard.unit, shard.number)
    if holder is not None:
        raise CacheMismatch(f"{root}: {shard} is being written by {holder}; wait")
    path = shard.record_path
    try:
        if damage.record is None:
            made = record_from_files(damaged, shard)
            if made is not None:
                write_file(root, path, canonical(made))
                return [path], False
        redone = _redo(damaged, maker, scratch / "shards", damage)
        redone = _committed_record(damaged, damage, redone, maker)
        files = [f for f, d in redone.files.items() if not damaged.cache.holds(f, d)]
        for relative in files:
            write_file(root, relative, (scratch / "shards" / relative).read_bytes())
        if damage.record is None:
            write_file(root, path, canonical(redone))
            files.append(path)
        shutil.rmtree(scratch / "shards" / unit_path(shard.unit))
        return files, True
    finally:
        leases.release(shard.unit, shard.number)


def _redo(damaged: DamagedCache, maker: _Maker, folder: Path, damage: ShardDamage) -> ShardRecord:
    """Write one shard again in a work folder, with the encoder of the original."""
    shard, cache = damage.shard, damaged.cache
    there = _computed_there(cache.plan, damage.record)
    commit_plan(folder, cache.plan)
    begin_arrays(folder, cache.plan, cache.layout, damaged.num_passes)
    again = Cache(folder, cache.plan, codecs=cache.codecs, form=cache.form)
    encoder = _encoder(there)
    job = None if shard.unit == SAMPLES else maker.compiled_job(there.get("compiler"))
    computed = job.computed(encoder) if job else None
    with CacheWriter(again, computed=computed) as writer:
        if job is None:
            rows, skipped = _samples_again(damaged, maker, shard.number)
            writer.commit_samples(shard.number, rows, skipped)
        else:
            chosen = [(int(shard.unit), shard.number)]
            with ProgressReport(str(shard), cache.identity.rows_of(shard.number)) as progress:
                write_claimed(job, writer, cache.codecs, chosen, progress, encoder=encoder)
    return again.record(shard)


def _samples_again(
    damaged: DamagedCache, maker: _Maker, shard: int
) -> tuple[SampleRows, tuple[str, ...]]:
    """Return keys, labels and hashes of a shard's images, and the keys of skipped images."""
    identity = damaged.cache.identity
    first = shard * identity.shard_size
    positions = range(first, first + identity.rows_of(shard))
    skipped: tuple[str, ...] | None = None if identity.skip_corrupt else ()
    for unit in damaged.units:  # every pass's record names the images that were corrupt
        record = intact_record(damaged, ShardId(unit, shard))
        skipped = skipped if record is None else record.skipped
    return drawn_samples(maker.drawn, positions, skipped)


def _committed_record(
    damaged: DamagedCache, damage: ShardDamage, redone: ShardRecord, maker: _Maker
) -> ShardRecord:
    """Return the committed record of a shard that was written again.

    Raises:
        CacheMismatch: The shard has other bytes or samples than were committed.
    """
    cache, shard = damaged.cache, damage.shard
    expected = damaged.record_hash_of(shard)
    what = f"{cache.location}: {shard}"
    why = f"{_why(damaged.plan, damage.record, maker)}. Nothing was replaced"
    if damage.record is not None:
        if redone.model_copy(update={"computed": damage.record.computed}) == damage.record:
            return damage.record
        committed = damage.record.files
        other = [path for path, d in redone.files.items() if committed.get(path) != d]
        raise CacheMismatch(
            f"{what}, computed again, has other bytes than were committed, such as"
            f" {(other or ['its samples'])[0]}: {why}"
        )
    if expected is not None:
        committed_record = record_in_manifest(damaged, redone)
        if committed_record is None:
            raise CacheMismatch(
                f"{what}, computed again, is not the one the manifest was written for: {why}"
            )
        return committed_record
    for unit in damaged.units:
        twin = intact_record(damaged, ShardId(unit, shard.number))
        if twin is not None and twin.samples_sha256 != redone.samples_sha256:
            raise CacheCorrupt(
                f"{what}, computed again, has other images than the record of {unit} names;"
                " pass the --data-dir that the cache was made from"
            )
    # Nothing is left to prove that the same bytes were made; the views at least must be the same.
    check_pixels(cache, maker.drawn, skip_damaged=True)
    return redone
