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
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from scalekd.cache.files import remove_abandoned, temporary_beside
from scalekd.cache.layout import MANIFEST_FILE, SAMPLES, Layout, Unit, record_path, unit_path
from scalekd.cache.lease import Leases, remove_settled
from scalekd.cache.manifest import Identity, ShardRecord, canonical
from scalekd.cache.records import read_record, record_hash
from scalekd.cache.repair import (
    ShardDamage,
    Standing,
    believed,
    damaged_documents,
    damaged_shards,
    drop_manifest,
    is_sound,
    put,
    record_from_files,
    remove_stranger,
    sound_record,
)
from scalekd.cache.targets import CacheCodecs, save_arrays
from scalekd.cache.verify import verify
from scalekd.cache.writer import CacheWriter, SampleRows, begin, finish, table_files
from scalekd.data.drawing import DrawnViews, drawn_samples
from scalekd.data.samples import ImageDataset, open_dataset
from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._signals import terminable
from scalekd.pipelines.cache_teacher import (
    CacheTeacherConfig,
    calibrate,
    draw_witnesses,
    write_claimed,
)
from scalekd.teachers import Teacher, TeacherConfig, TeacherSpec, load_teacher
from scalekd.views import ViewPolicy, pixel_environment

_ABOUT_ORIGIN = frozenset({"model", "weights_source", "licence"})  # decide no byte of a target


class RepairConfig(BaseModel):
    """What ``scalekd cache repair`` was asked for.

    Attributes:
        cache: Folder of the cache.
        data_dir: The images, when shards or witnesses must be made again.
        split: Which of them; see :func:`scalekd.data.open_dataset`.
        model: The teacher's name here, when the manifest's does not resolve.
        checkpoint: The teacher's weights, when the cache was made from a file.
        model_kwargs: Arguments of the model, instead of the manifest's.
        workers: Processes that draw views.
        remove_extra: Delete files that nothing accounts for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    cache: Path
    data_dir: str | None = None
    split: str = "train"
    model: str | None = None
    checkpoint: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    workers: int = Field(default=2, ge=0)
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


@terminable()
def repair_cache(config: RepairConfig) -> RepairResult:
    """Give back the cache as it was committed.

    Raises:
        DataError: No cache, or no images, where they should be.
        CacheError: Nothing says what the cache is to hold; or data set, teacher or machine are
            others than those the cache was made with, and give other bytes.
        UsageError: Images are needed, and ``data_dir`` is not given.
    """
    started = time.monotonic()
    root = config.cache
    standing = believed(root)
    remove_abandoned(root)
    maker = TeacherAgain(config, standing.plan.identity)
    mended, redone = [], []
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
    if standing.manifest is None:
        drop_manifest(root)
    before = _content(root / MANIFEST_FILE)
    finish(root, standing.plan, layout, standing.num_passes)
    if before != _content(root / MANIFEST_FILE):
        mended.append(MANIFEST_FILE)
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


class TeacherAgain:
    """The images and the teacher that a cache was made with, looked up when first needed.

    Args:
        config: Where they are.
        identity: What they must be.
    """

    def __init__(self, config: RepairConfig, identity: Identity) -> None:
        self._config, self._identity = config, identity

    @cached_property
    def images(self) -> ImageDataset:
        """The image set.

        Raises:
            UsageError: Nobody said where it is.
            CacheMismatch: It is another one.
        """
        data, config = self._identity.data, self._config
        if config.data_dir is None:
            raise UsageError(
                f"{config.cache}: what is damaged must be drawn again; pass --data-dir, the images"
                " the cache was made from"
            )
        images = open_dataset(config.data_dir, config.split).limited(data.num_samples)
        if images.fingerprint != data.fingerprint:
            raise CacheMismatch(
                f"{images.place} is not the image set of {config.cache}: {len(images):,} samples"
                f" here, {data.num_samples:,} there, or other keys, labels or sizes; pass the"
                " --data-dir and --split that the cache was made with"
            )
        return images

    @cached_property
    def drawn(self) -> DrawnViews:
        """The cache's views of the images."""
        views = self._identity.views
        return DrawnViews(
            self.images,
            ViewPolicy.from_config(views.policy),
            views.seed,
            views.view_size,
            skip_corrupt=self._identity.skip_corrupt,
        )

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher.

        Raises:
            UsageError, EnvironmentFault: It cannot be built or its weights cannot be read.
            CacheMismatch: It is another one.
        """
        cached, config = TeacherSpec.model_validate(self._identity.teacher), self._config
        if cached.weights_source == "checkpoint" and config.checkpoint is None:
            raise UsageError(
                f"{config.cache}: its teacher {cached.model} was read from a file; pass it as"
                " --checkpoint"
            )
        kwargs = {**cached.model_kwargs, "num_classes": cached.num_classes or 0}
        teacher = load_teacher(
            TeacherConfig(
                model=config.model or cached.model,
                checkpoint=config.checkpoint,
                pretrained=cached.weights_source == "pretrained",
                model_kwargs={**kwargs, **config.model_kwargs},
                img_size=cached.img_size,
                mean=cached.mean,
                std=cached.std,
                tail_blocks=cached.tail_blocks,
            )
        )
        here, there = teacher.spec.model_dump(mode="json"), cached.model_dump(mode="json")
        different = [
            f"{name} is {there[name]} in the cache, {here[name]} here"
            for name in here
            if here[name] != there[name] and name not in _ABOUT_ORIGIN
        ]
        if different:
            raise CacheMismatch(f"{config.cache}: another teacher: {'; '.join(different)}")
        found = torch.accelerator.current_accelerator(check_available=True)
        return teacher.to(found or torch.device("cpu"))

    def stage_one(self, output: Path) -> CacheTeacherConfig:
        """The configuration that made the cache, writing to ``output``."""
        identity = self._identity
        return CacheTeacherConfig(
            teacher=TeacherConfig(model=str(identity.teacher["model"])),
            data_dir=self._config.data_dir or "",
            output=output,
            stages=tuple(identity.request["stages"]),
            logits=identity.request["logits"],
            codec=identity.request["codec"],
            seed=identity.views.seed,
            batch_size=identity.batch_size,
            workers=self._config.workers,
            precision=identity.precision,
            shard_size=identity.shard_size,
            skip_corrupt=identity.skip_corrupt,
        )


def _mend_tables(root: Path, standing: Standing, maker: TeacherAgain, scratch: Path) -> list[str]:
    """Tail, witnesses and codec tables, which the plan names with their digests."""
    identity = standing.plan.identity
    expected = table_files(identity)
    lost = [path for path, found in expected.items() if not is_sound(root, path, found)]
    if not lost:
        return []
    if lost == [identity.views.witnesses]:
        save_arrays(scratch, "witnesses", {"pixels": draw_witnesses(maker.drawn)})
    else:
        calibrate(maker.stage_one(scratch), maker.teacher, maker.images, maker.drawn.policy)
    for path in lost:
        if not is_sound(scratch, path, expected[path]):
            raise CacheMismatch(
                f"{root / path}: made again, it is not the file that was committed;"
                f" {_why(identity)}"
            )
        put(root, path, (scratch / path).read_bytes())
    return lost


def _why(identity: Identity) -> str:
    """What may make this machine give other bytes."""
    here, there = pixel_environment(), identity.views.environment
    changed = [
        f"{name} {there.get(name)} there, {here.get(name)} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    return (
        f"this machine draws with other versions ({', '.join(changed)}): repair with those of the"
        " cache"
        if changed
        else "the processor or the version of torch computes otherwise here (`scalekd cache info`"
        " names the versions): repair on a machine like the one that wrote the cache"
    )


def _mend_shard(
    root: Path,
    standing: Standing,
    layout: Layout,
    maker: TeacherAgain,
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
        redone = _redo(root, standing, layout, maker, scratch / "shards", unit, shard)
        _hold_against_survivors(root, standing, layout, damage, redone)
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
    maker: TeacherAgain,
    place: Path,
    unit: Unit,
    shard: int,
) -> ShardRecord:
    """Make one shard again in a work folder."""
    drawn = maker.drawn  # before the teacher, whose weights take longer to read
    plan = begin(place, standing.plan, layout, standing.num_passes)
    with CacheWriter(place, plan, layout) as writer:
        if unit == SAMPLES:
            rows, skipped = _samples_again(root, standing, layout, maker, shard)
            writer.commit_samples(shard, rows, skipped)
        else:
            codecs = CacheCodecs.load(root, plan.identity)
            count = plan.identity.rows_of(shard)
            with ProgressReport(f"pass {unit}, shard {shard}", count) as progress:
                write_claimed(
                    maker.stage_one(place),
                    writer,
                    codecs,
                    maker.teacher,
                    drawn,
                    [(int(unit), shard)],
                    progress,
                )
    return read_record(place, plan, layout, unit, shard)


def _samples_again(
    root: Path, standing: Standing, layout: Layout, maker: TeacherAgain, shard: int
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
    root: Path, standing: Standing, layout: Layout, damage: ShardDamage, redone: ShardRecord
) -> None:
    """Raise unless the redone shard is the one that was committed, as far as anything tells."""
    unit, shard, identity = damage.unit, damage.shard, layout.identity
    expected = standing.record_hash_of(unit, shard)
    what = f"{root}: shard {shard} of {'the samples' if unit == SAMPLES else f'pass {unit}'}"
    if damage.record is not None:
        if redone == damage.record:
            return
        committed = damage.record.files
        other = [path for path, found in redone.files.items() if committed.get(path) != found]
        raise CacheMismatch(
            f"{what}, made again, has other bytes than were committed, such as"
            f" {(other or ['its samples'])[0]}: {_why(identity)}. Nothing was replaced"
        )
    if expected is not None:
        if record_hash(redone) != expected:
            raise CacheMismatch(
                f"{what}, made again, is not the one the manifest was written for:"
                f" {_why(identity)}. Nothing was replaced"
            )
        return
    for other_unit in standing.units:
        twin = sound_record(root, standing, layout, other_unit, shard)
        if twin is not None and twin.samples_sha256 != redone.samples_sha256:
            raise CacheCorrupt(
                f"{what}, made again, holds other images than the record of {other_unit} tells;"
                " pass the --data-dir that the cache was made from"
            )
    if identity.views.environment != pixel_environment():
        raise CacheMismatch(
            f"{what}: neither its record nor the manifest is left to prove that it is made again"
            f" to the same bytes, and {_why(identity)}. Nothing was replaced"
        )
