"""Mending a damaged cache: exactly what is damaged or missing is made again, to the same bytes.

    scalekd cache repair ./swin_l-cache --data-dir /imagenet

Everything is made in a work folder first and held against what survives: the digest in the plan
for tail, tables and witnesses, the commit record or the manifest for shards. A machine that does
not give the same bytes changes nothing.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel

from scalekd.cache.finishing import finish
from scalekd.cache.forms import Form, read_form
from scalekd.cache.forms.webdataset.form import INFO_FILE
from scalekd.cache.layout import MANIFEST_FILE, SAMPLES, Layout, record_path, unit_path
from scalekd.cache.lease import Leases, remove_settled
from scalekd.cache.manifest import Identity, Plan, ShardRecord, canonical
from scalekd.cache.planning import begin, commit_plan
from scalekd.cache.records import read_record
from scalekd.cache.repair import (
    ShardDamage,
    Standing,
    believed,
    damaged_documents,
    damaged_form,
    damaged_shards,
    drop_manifest,
    is_sound,
    proven,
    put,
    record_from_files,
    remove_stranger,
    sound_record,
)
from scalekd.cache.rows import SampleRows
from scalekd.cache.selection import refuse_part
from scalekd.cache.tables import table_files
from scalekd.cache.targets import CacheCodecs, save_arrays
from scalekd.cache.verify import verify
from scalekd.cache.writer import CacheWriter
from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.loading.drawing import DrawnViews, drawn_samples
from scalekd.pipelines._arithmetic import compute_environment, strict_float32
from scalekd.pipelines._calibrate import NUM_WITNESSES, calibrate
from scalekd.pipelines._job import Job, views_of
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._same_pixels import changed_versions, check_pixels, draw_witnesses
from scalekd.pipelines._signals import terminable
from scalekd.pipelines._sources import CacheSources
from scalekd.pipelines._teacher_stream import EncoderName
from scalekd.pipelines._write_shards import write_claimed
from scalekd.storage import LocalStorage, is_remote
from scalekd.storage.files import remove_abandoned, temporary_beside
from scalekd.training.compilation import check_backend


class RepairConfig(CacheSources):
    """What ``scalekd cache repair`` was asked for.

    Attributes:
        remove_extra: Delete files that nothing accounts for.
    """

    remove_extra: bool = False


class RepairResult(BaseModel):
    """What a repair did.

    Attributes:
        path: Folder of the cache.
        sound: Whether nothing is wrong any more.
        mended: Files written, by path inside the cache.
        shards_redone: ``(unit, shard)`` that were drawn and sent through the teacher again.
        removed: Strangers deleted.
        problems: What is still wrong, such as strangers that were left.
        seconds: Time taken.
    """

    path: str
    sound: bool
    mended: tuple[str, ...]
    shards_redone: tuple[tuple[str, int], ...]
    removed: tuple[str, ...]
    problems: tuple[str, ...]
    seconds: float


class _Maker:
    """Draws the views of the cache and runs its teacher, both opened when first needed."""

    def __init__(self, sources: CacheSources, identity: Identity) -> None:
        self._sources, self._identity = sources, identity

    @cached_property
    def form(self) -> Form:
        return read_form(self._sources.cache)

    @cached_property
    def drawn(self) -> DrawnViews:
        images = self._sources.images(self._sources.open(), self._identity.data)
        return views_of(self._identity, self.form, images)

    @property
    def device(self) -> torch.device:
        device = torch.accelerator.current_accelerator(check_available=True)
        return device or torch.device("cpu")

    @cached_property
    def job(self) -> Job:
        job = Job.of(self._identity, self.form, self._sources, drawn=self.drawn)
        return job.to(self.device)

    def compiled_job(self, compiler: str | None) -> Job:
        """The job with its teacher compiled by this backend of ``torch.compile``, if by any."""
        if compiler is None:
            return self.job
        check_backend(compiler)
        self.job.teacher.compile(backend=compiler)
        return replace(self.job, compiler=compiler)


@terminable()
@strict_float32()
def repair_cache(config: RepairConfig) -> RepairResult:
    """Give back the cache as it was committed.

    Raises:
        DataError: No cache, or no images, where they should be.
        CacheError: Nothing says what the cache is to hold; or data set, teacher or machine are
            others than those the cache was made with, and give other bytes.
        UsageError: Images are needed, and ``data_dir`` is not given.
    """
    started = time.monotonic()
    if is_remote(str(config.cache)):
        raise UsageError(
            f"{config.cache}: only a folder can be repaired in place; fetch it with `scalekd cache"
            " pull`, repair it, and send it back with `scalekd cache push --check`"
        )
    root = Path(config.cache)
    standing = believed(root)
    refuse_part(LocalStorage(root), "mended")
    remove_abandoned(root)
    maker = _Maker(config, standing.plan.identity)
    mended, redone = [], []
    for relative, content in damaged_form(root, standing).items():
        put(root, relative, content)
        mended.append(relative)
    with _scratch_folder(root) as scratch:
        mended += _mend_tables(root, standing, maker, scratch)
        layout = CacheCodecs.load(root, standing.plan.identity).layout(standing.plan.identity)
        for relative, content in damaged_documents(root, standing, layout).items():
            put(root, relative, content)
            mended.append(relative)
        with Leases(root) as leases:
            for damage in damaged_shards(root, standing, layout):
                written, again = _mend_shard(root, standing, layout, maker, scratch, leases, damage)
                mended += written
                if again:
                    redone.append((str(damage.unit), damage.shard))
    remove_settled(root)
    before = {path: _content(root / path) for path in (INFO_FILE, MANIFEST_FILE)}
    drop_manifest(root, standing)
    finish(root, standing.plan, layout, standing.num_passes)
    mended += [path for path, content in before.items() if content != _content(root / path)]
    removed = []
    found = verify(root, quick=True)
    if config.remove_extra and found.strangers:
        for path in found.strangers:
            remove_stranger(path)
            removed.append(path.relative_to(root).as_posix())
        found = verify(root, quick=True)
    return RepairResult(
        path=str(root),
        sound=not found.problems,
        mended=tuple(mended),
        shards_redone=tuple(redone),
        removed=tuple(removed),
        problems=tuple(found.problems),
        seconds=time.monotonic() - started,
    )


@contextmanager
def _scratch_folder(root: Path) -> Iterator[Path]:
    """A folder inside the cache, so that it is on a disk that can hold a shard."""
    folder = temporary_beside(root / "repair")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _mend_tables(root: Path, standing: Standing, maker: _Maker, scratch: Path) -> list[str]:
    """Tail, witnesses and codec tables, which the plan names with their digests."""
    identity = standing.plan.identity
    expected = table_files(identity)
    lost = [path for path, found in expected.items() if not is_sound(root, path, found)]
    if not lost:
        return []
    if lost == [identity.views.witnesses]:
        pixels = draw_witnesses(maker.drawn, at_most=NUM_WITNESSES)
        save_arrays(scratch, "witnesses", {"pixels": pixels})
    else:
        calibrate(maker.job, scratch, keep_tail=identity.tail is not None)
    for path in lost:
        if not is_sound(scratch, path, expected[path]):
            raise CacheMismatch(
                f"{root / path}: made again, it is not the file that was committed;"
                f" {_why(standing.plan, None, maker)}"
            )
        put(root, path, (scratch / path).read_bytes())
    return lost


def _why(plan: Plan, record: ShardRecord | None, maker: _Maker) -> str:
    """What may make this machine give other bytes."""
    changed = changed_versions(plan.identity.views.environment)
    if changed:
        versions = ", ".join(changed)
        return f"the cache was written with other versions ({versions}): repair it with those"
    there = _computed_there(plan, record)
    here = compute_environment(maker.device, _encoder(there), there.get("compiler"))
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
    """How the targets of a shard were computed, as far as the cache says."""
    return (record and record.computed) or plan.provenance.computed or {}


def _encoder(computed: dict[str, str]) -> EncoderName:
    """Who encoded the features; older releases had one encoder."""
    return "torch" if computed.get("encoder") == "torch" else "numpy"


def _mend_shard(
    root: Path,
    standing: Standing,
    layout: Layout,
    maker: _Maker,
    scratch: Path,
    leases: Leases,
    damage: ShardDamage,
) -> tuple[list[str], bool]:
    """Files written, and whether the shard had to be drawn again."""
    unit, shard = damage.unit, damage.shard
    holder = leases.acquire(unit, shard)
    if holder is not None:
        raise CacheMismatch(f"{root}: shard {shard} of {unit} is being written by {holder}; wait")
    path = record_path(unit, shard)
    try:
        if damage.record is None:
            made = record_from_files(root, standing, layout, unit, shard)
            if made is not None:
                put(root, path, canonical(made))
                return [path], False
        redone = _redo(root, standing, layout, maker, scratch / "shards", damage)
        redone = _hold_against_survivors(root, standing, layout, damage, redone, maker)
        files = [f for f, found in redone.files.items() if not is_sound(root, f, found)]
        for relative in files:
            put(root, relative, (scratch / "shards" / relative).read_bytes())
        if damage.record is None:
            put(root, path, canonical(redone))
            files.append(path)
        shutil.rmtree(scratch / "shards" / unit_path(unit))
        return files, True
    finally:
        leases.release(unit, shard)


def _redo(
    root: Path,
    standing: Standing,
    layout: Layout,
    maker: _Maker,
    place: Path,
    damage: ShardDamage,
) -> ShardRecord:
    """Make one shard again in a work folder, encoded as it was."""
    unit, shard = damage.unit, damage.shard
    there = _computed_there(standing.plan, damage.record)
    plan = commit_plan(place, standing.plan)
    begin(place, plan, layout, standing.num_passes)
    encoder = _encoder(there)
    job = None if unit == SAMPLES else maker.compiled_job(there.get("compiler"))
    computed = job.computed(encoder) if job else None
    with CacheWriter(place, plan, layout, computed=computed) as writer:
        if job is None:
            rows, skipped = _samples_again(root, standing, layout, maker, shard)
            writer.commit_samples(shard, rows, skipped)
        else:
            codecs = CacheCodecs.load(root, plan.identity)
            count = plan.identity.rows_of(shard)
            with ProgressReport(f"pass {unit}, shard {shard}", count) as progress:
                write_claimed(job, writer, codecs, [(int(unit), shard)], progress, encoder=encoder)
    return read_record(place, plan, layout, unit, shard)


def _samples_again(
    root: Path, standing: Standing, layout: Layout, maker: _Maker, shard: int
) -> tuple[SampleRows, tuple[str, ...]]:
    """Keys, labels and hashes of a shard's images; no teacher is asked."""
    first = shard * layout.identity.shard_size
    positions = range(first, first + layout.identity.rows_of(shard))
    skipped: tuple[str, ...] | None = None if layout.identity.skip_corrupt else ()
    for unit in standing.units:  # which images were corrupt, every pass's record tells
        record = sound_record(root, standing, layout, unit, shard)
        skipped = skipped if record is None else record.skipped
    keys, labels, hashes, skipped = drawn_samples(maker.drawn, positions, skipped)
    return SampleRows(keys, labels, hashes), skipped


def _hold_against_survivors(
    root: Path,
    standing: Standing,
    layout: Layout,
    damage: ShardDamage,
    redone: ShardRecord,
    maker: _Maker,
) -> ShardRecord:
    """The committed record; raises unless the redone shard is its, as far as anything tells."""
    unit, shard = damage.unit, damage.shard
    expected = standing.record_hash_of(unit, shard)
    what = f"{root}: shard {shard} of {'the samples' if unit == SAMPLES else f'pass {unit}'}"
    why = f"{_why(standing.plan, damage.record, maker)}. Nothing was replaced"
    if damage.record is not None:
        if redone.model_copy(update={"computed": damage.record.computed}) == damage.record:
            return damage.record
        committed = damage.record.files
        other = [path for path, found in redone.files.items() if committed.get(path) != found]
        raise CacheMismatch(
            f"{what}, made again, has other bytes than were committed, such as"
            f" {(other or ['its samples'])[0]}: {why}"
        )
    if expected is not None:
        committed_record = proven(standing, redone)
        if committed_record is None:
            raise CacheMismatch(
                f"{what}, made again, is not the one the manifest was written for: {why}"
            )
        return committed_record
    for other_unit in standing.units:
        twin = sound_record(root, standing, layout, other_unit, shard)
        if twin is not None and twin.samples_sha256 != redone.samples_sha256:
            raise CacheCorrupt(
                f"{what}, made again, holds other images than the record of {other_unit} tells;"
                " pass the --data-dir that the cache was made from"
            )
    # Nothing is left to prove that the same bytes were made; the views at least must be the same.
    check_pixels(LocalStorage(root), standing.plan, layout, maker.drawn, skip_damaged=True)
    return redone
