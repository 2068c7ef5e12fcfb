"""Stage one: run the teacher once over drawn views and keep what it says.

    scalekd cache-teacher --model swin_l --data-dir /imagenet --output ./swin_l-cache

Every process (``torchrun``, ``accelerate launch``, or several commands with ``--shards``) takes
shards of its own. Running the same command again finishes what is missing.
"""

import dataclasses
import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from scalekd.cache.files import FileDigest, remove_abandoned
from scalekd.cache.layout import MANIFEST_FILE, RECORDS_FOLDER, SAMPLES, Layout
from scalekd.cache.manifest import (
    CodecInfo,
    DataInfo,
    Identity,
    Plan,
    Provenance,
    StageInfo,
    ViewsInfo,
)
from scalekd.cache.records import has_record
from scalekd.cache.targets import CacheCodecs, save_arrays, save_codec, save_table, stage_info
from scalekd.cache.writer import (
    CacheWriter,
    SampleRows,
    begin,
    committed_passes,
    differences,
    finish,
    read_plan,
    remove_cache,
)
from scalekd.codecs import (
    DEFAULT_FEATURE_CODEC,
    FeatureCodec,
    create_logit_codec,
    fit_codec,
    measure_errors,
    parse_codec,
)
from scalekd.data import worker_faults
from scalekd.data.drawing import (
    DrawnBatch,
    DrawnViews,
    DrawRequest,
    drawing_loader,
    shard_requests,
)
from scalekd.data.samples import ImageDataset, open_dataset
from scalekd.errors import CacheMismatch, DataError, EnvironmentFault, UsageError
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._signals import terminable
from scalekd.teachers import Teacher, TeacherConfig, load_teacher, resolve_model_name, save_tail
from scalekd.training.coordination import Coordinator
from scalekd.views import ViewPolicy, pack_views, pixel_environment

_PREFIX_VIEWS = 256  # calibration of the tail's constant prefix tokens; their mean moves little
_NUM_WITNESSES = 8
_LEAST_COMPRESSED = {"float16": 0.8, "int8": 0.7, "int16": 0.05}  # of a plane's bytes, by type
_HELD_OUT_VIEWS = 128  # of which the codecs' errors are measured
BLOCK_SIZE = 256
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")
_SOFTWARE = ("scalekd", "torch", "timm", "zarr", "numcodecs", "pcodec", "numpy")


class CacheTeacherConfig(BaseModel):
    """What ``scalekd cache-teacher`` was asked for.

    Attributes:
        teacher: The teacher.
        data_dir: Where the images are.
        split: Which of them; see :func:`scalekd.data.open_dataset`.
        output: Folder of the cache.
        passes: Views of every sample.
        stages: Stages whose features are kept.
        logits: ``full``, ``topk:K`` or ``none``.
        codec: Codec of the features.
        aug: View policy; see :class:`scalekd.views.ViewPolicy`.
        seed: Of the views.
        limit: Take the first so many samples.
        shards: First and last shard this command is to do; all when ``None``.
        batch_size: Views a teacher forward. It decides rounding, so it is part of the cache.
        workers: Processes that draw views.
        precision: Of the teacher's arithmetic.
        shard_size: Views a shard; chosen from the number of samples when ``None``.
        skip_corrupt: Leave corrupt images out instead of stopping.
        overwrite: Delete a cache that stands at ``output`` first.
        note: Free text for the manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: TeacherConfig
    data_dir: str
    split: str = "train"
    output: Path
    passes: int = Field(default=1, ge=1, le=9999)
    stages: tuple[Literal[3, 4], ...] = (3, 4)
    logits: str = "full"
    codec: str = DEFAULT_FEATURE_CODEC
    aug: str = "crop-flip"
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    limit: int | None = Field(default=None, ge=1)
    shards: tuple[int, int] | None = None
    batch_size: int = Field(default=64, ge=1)
    workers: int = Field(default=2, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    shard_size: int | None = Field(default=None, ge=1, le=1 << 24)
    skip_corrupt: bool = False
    overwrite: bool = False
    note: str | None = None


class CacheTeacherResult(BaseModel):
    """What a run did: counts, bytes, seconds. Shards and views are those of all processes.

    ``shards_elsewhere`` names the shards that other jobs were still writing, and those jobs.
    """

    output: str
    cache_id: str
    complete: bool
    is_main_process: bool = Field(exclude=True)
    num_samples: int
    num_passes: int
    num_shards: int
    shards_written: int
    shards_found: int
    shards_elsewhere: tuple[str, ...]
    views_written: int
    skipped: int
    seconds: float
    views_per_second: float
    data_wait_share: float
    total_bytes: int | None
    bytes_per_view: float | None


@terminable()
@worker_faults()
def cache_teacher(config: CacheTeacherConfig) -> CacheTeacherResult:
    """Write a cache, or finish one.

    Raises:
        ScaleKDError: Anything a user can mend; what was committed is kept.
    """
    # Accelerate starts gloo for processes on CPUs only when told that CPUs are meant.
    state = PartialState(cpu=not torch.accelerator.is_available())
    everyone = Coordinator(state.num_processes)

    def on_main(work: Callable[[], T]) -> T | None:
        """Run on the main process alone; all go on together, or fail together."""
        return everyone.together(lambda: work() if state.is_main_process else None)

    images, policy = everyone.together(lambda: preflight(config))
    teacher = everyone.together(lambda: load_checked_teacher(config).to(state.device))
    if config.overwrite:
        on_main(lambda: remove_cache(config.output))
    on_main(lambda: _prepare(config, teacher, images, policy))
    plan, codecs = everyone.together(lambda: _join(config, teacher, images, policy))
    config = config.model_copy(
        update={"passes": max(config.passes, committed_passes(config.output, plan))}
    )
    layout = codecs.layout(plan.identity)
    on_main(lambda: _tidy_and_check_space(config, plan, layout))
    with CacheWriter(config.output, plan, layout) as writer:
        work = everyone.together(lambda: _divide(config, writer, state))
        drawn = DrawnViews(
            images, policy, config.seed, teacher.spec.img_size, skip_corrupt=config.skip_corrupt
        )
        with ProgressReport("caching", work.num_views, enabled=state.is_main_process) as progress:
            num_written = everyone.together(
                lambda: _write_shards(config, writer, codecs, teacher, drawn, work.shards, progress)
            )
        elsewhere = _elsewhere(writer)
    counts = everyone.collect((num_written, work.num_found, progress.done, elsewhere))
    num_views = sum(views for _, _, views, _ in counts)
    manifest = on_main(lambda: finish(config.output, plan, layout, config.passes))
    return CacheTeacherResult(
        output=str(config.output),
        cache_id=plan.cache_id,
        complete=manifest is not None,
        is_main_process=state.is_main_process,
        num_samples=plan.identity.data.num_samples,
        num_passes=config.passes,
        num_shards=plan.identity.num_shards,
        shards_written=sum(done for done, _, _, _ in counts),
        shards_found=sum(found for _, found, _, _ in counts),
        shards_elsewhere=tuple(line for _, _, _, lines in counts for line in lines),
        views_written=num_views,
        skipped=len(manifest.skipped) if manifest else 0,
        seconds=progress.seconds,
        views_per_second=num_views / progress.seconds,
        data_wait_share=progress.data_wait_share,
        total_bytes=manifest.total_bytes if manifest else None,
        bytes_per_view=manifest.total_bytes / max(1, manifest.num_views) if manifest else None,
    )


def preflight(config: CacheTeacherConfig) -> tuple[ImageDataset, ViewPolicy]:
    """Find every avoidable error that costs nothing to find."""
    resolve_model_name(config.teacher.model)
    policy = ViewPolicy.parse(config.aug)
    parse_codec(config.codec)
    if config.logits != "none":
        create_logit_codec(config.logits, num_classes=1 << 16)
    if not config.overwrite:
        read_plan(config.output)
    elif config.shards is not None:
        raise UsageError(
            "--overwrite --shards: would delete the shards that other machines have done; delete"
            " the cache first, then start every part without --overwrite"
        )
    _check_writable(config.output)
    images = open_dataset(config.data_dir, config.split).limited(config.limit)
    shard_size = config.shard_size or default_shard_size(len(images))
    _check_shards(config.shards, -(-len(images) // shard_size))
    return images, policy


def _check_writable(output: Path) -> None:
    """Refuse now what would otherwise fail when the teacher is loaded and the codecs are fitted."""
    if (output / MANIFEST_FILE).exists():
        return  # complete, perhaps; if not, the first write says so
    place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise EnvironmentFault(
            f"--output {output}: {place} cannot be written to (no permission, or a read-only file"
            " system); choose another folder or ask its owner"
        )


def _check_shards(shards: tuple[int, int] | None, num_shards: int) -> None:
    if shards is not None and not 0 <= shards[0] <= shards[1] < num_shards:
        raise UsageError(
            f"--shards {shards[0]}-{shards[1]}: the cache has shards 0 to {num_shards - 1}"
        )


def _tidy_and_check_space(config: CacheTeacherConfig, plan: Plan, layout: Layout) -> None:
    """Remove what dead writers left; refuse to start a job that cannot fit on the disk."""
    remove_abandoned(config.output)
    records = sum(1 for _ in (config.output / RECORDS_FOLDER).glob("[0-9]*/*.json"))
    missing = max(0, config.passes * plan.identity.num_shards - records) * plan.identity.shard_size
    views = min(missing, config.passes * plan.identity.data.num_samples)
    at_least = views * sum(
        array.bytes_per_view * _LEAST_COMPRESSED.get(array.dtype.name, 0.0)
        for array in layout.views
        if array.per_block
    )
    free = shutil.disk_usage(config.output).free
    if free < at_least:
        raise EnvironmentFault(
            f"{config.output}: {free / 1e9:,.1f} GB are free, and {views:,} views need at least"
            f" {at_least / 1e9:,.1f} GB; free space, or choose fewer passes, --stages final or"
            " another --codec"
        )


def load_checked_teacher(config: CacheTeacherConfig) -> Teacher:
    teacher = load_teacher(config.teacher)
    if config.logits != "none":
        if teacher.spec.num_classes is None:
            raise UsageError(
                f"{teacher.spec.model} has no classification head, so it gives no logits; pass"
                " --logits none, or a --checkpoint with a head"
            )
        create_logit_codec(config.logits, teacher.spec.num_classes)
    return teacher


def _prepare(
    config: CacheTeacherConfig, teacher: Teacher, images: ImageDataset, policy: ViewPolicy
) -> None:
    """Calibrate and begin the cache, unless it was begun before, and then for this very job."""
    plan = read_plan(config.output)
    if plan is not None:
        _check_same_job(config, teacher, images, policy, plan)
    else:
        calibration = calibrate(config, teacher, images, policy)
        identity = _identity(config, teacher, images, policy, calibration)
        licence = teacher.spec.licence
        software = {name: importlib.metadata.version(name) for name in _SOFTWARE}
        plan = Plan.of(
            identity,
            Provenance(
                software=software,
                licence=licence,
                note=config.note,
                measured={
                    str(stage): errors for stage, errors in calibration.measured_errors.items()
                },
            ),
        )
    layout = CacheCodecs.load(config.output, plan.identity).layout(plan.identity)
    begin(config.output, plan, layout, config.passes)


@dataclass(frozen=True)
class _Calibration:
    """What was learnt from the calibration views, and the files it was written to."""

    stages: dict[int, StageInfo]
    logits: CodecInfo | None
    tail: tuple[str, FileDigest] | tuple[None, None]
    witnesses: tuple[str, FileDigest]
    measured_errors: dict[int, dict[str, Any]]


def calibrate(
    config: CacheTeacherConfig, teacher: Teacher, images: ImageDataset, policy: ViewPolicy
) -> _Calibration:
    """Fit the codecs and the tail's prefix tokens on views of pass 0, and keep witnesses."""
    request, spec = parse_codec(config.codec), teacher.spec
    wanted = max((request.num_calibration_views(spec.stages[s]) for s in config.stages), default=0)
    if config.stages and spec.stages[3].num_prefix_tokens:
        wanted = max(wanted, _PREFIX_VIEWS)
    held_out = _HELD_OUT_VIEWS if config.stages else 0
    count = min(len(images), max(wanted + held_out, _NUM_WITNESSES))
    num_held_out = min(held_out, count // 2)
    positions = np.linspace(0, len(images) - 1, count).astype(int)
    # Every k-th view is held out, so that both sets spread over the whole image set.
    every = -(-count // num_held_out) if num_held_out else count + 1
    is_held_out = np.arange(count) % every == every - 1
    drawn = DrawnViews(images, policy, config.seed, spec.img_size, config.skip_corrupt)
    seen = draw_witnesses(drawn)
    fit_on = _Features(config, teacher, drawn, positions[~is_held_out])
    try:
        teacher.calibrate_prefix(fit_on.pixels)
    except ValueError as error:
        raise DataError(f"{images.place}: {error}: all of them are corrupt") from error
    stages: dict[int, StageInfo] = {}
    measured: dict[int, dict[str, Any]] = {}
    for stage in config.stages:
        shape = spec.stages[stage]
        codec = fit_codec(request, shape, fit_on.blocks(stage))
        stages[stage] = stage_info(codec, save_codec(config.output, codec, f"stage{stage}"))
        if num_held_out:
            unseen = _Features(config, teacher, drawn, positions[is_held_out])
            original = list(unseen.blocks(stage))
            if original:
                measured[stage] = _measured(codec, np.concatenate(original))
    logits = None
    if config.logits != "none" and spec.num_classes is not None:
        logit_codec = create_logit_codec(config.logits, spec.num_classes)
        logits = save_codec(config.output, logit_codec, "logits")
    return _Calibration(
        stages=stages,
        logits=logits,
        tail=_save_tail(config, teacher) if config.stages else (None, None),
        witnesses=save_arrays(config.output, "witnesses", {"pixels": seen}),
        measured_errors=measured,
    )


def draw_witnesses(drawn: DrawnViews) -> np.ndarray[Any, Any]:
    """Pixels of the views, in pass 0, of the first samples that can be decoded."""
    found: list[np.ndarray[Any, Any]] = []
    for position in range(len(drawn.images)):
        batch = drawn.draw(DrawRequest(0, 0, (position,)))
        found.extend(batch.pixels.permute(0, 2, 3, 1).numpy())
        if len(found) == _NUM_WITNESSES:
            break
    if not found:
        raise DataError(f"{drawn.images.place}: every image is corrupt")
    return np.stack(found)


def _measured(codec: FeatureCodec, original: np.ndarray[Any, Any]) -> dict[str, Any]:
    decoded = codec.decode(codec.encode(original))
    return measure_errors(original, decoded, codec.shape).to_json()


def _save_tail(config: CacheTeacherConfig, teacher: Teacher) -> tuple[str, FileDigest]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tail.safetensors"
        save_tail(teacher.tail(), path)
        return save_table(config.output, "tail", path.read_bytes())


class _Features:
    """What a teacher says of chosen samples; computed again, batch by batch, when asked again."""

    def __init__(
        self,
        config: CacheTeacherConfig,
        teacher: Teacher,
        drawn: DrawnViews,
        positions: np.ndarray[Any, Any],
    ) -> None:
        self._config, self._teacher, self._drawn = config, teacher, drawn
        size = config.batch_size
        self._requests = [
            DrawRequest(0, 0, tuple(int(p) for p in positions[start : start + size]))
            for start in range(0, len(positions), size)
        ]

    @property
    def pixels(self) -> Iterator[Tensor]:
        device = self._teacher.mean.device
        for batch in drawing_loader(self._drawn, self._requests, num_workers=self._config.workers):
            if batch.keys:  # else every image of it was corrupt
                yield batch.pixels.to(device)

    def blocks(self, stage: int) -> Iterator[np.ndarray[Any, Any]]:
        total = sum(len(request.samples) for request in self._requests)
        with ProgressReport(f"calibrating stage {stage}", total) as progress:
            for pixels in self.pixels:
                progress.advance(len(pixels))
                yield run_teacher(self._teacher, pixels, self._config.precision).features[stage]


@dataclass(frozen=True)
class TeacherArrays:
    """A teacher's output on the host, float32."""

    features: dict[int, np.ndarray[Any, Any]]
    logits: np.ndarray[Any, Any] | None


def run_teacher(teacher: Teacher, pixels: Tensor, precision: str) -> TeacherArrays:
    """One forward in the precision asked for."""
    device = teacher.mean.device
    autocast = torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)
    with torch.inference_mode(), autocast:
        output = teacher(pixels.to(device, non_blocking=True))
    logits = None if output.logits is None else output.logits.float().cpu().numpy()
    return TeacherArrays(
        {stage: found.float().cpu().numpy() for stage, found in output.features.items()}, logits
    )


def _identity(
    config: CacheTeacherConfig,
    teacher: Teacher,
    images: ImageDataset,
    policy: ViewPolicy,
    made: _Calibration | Identity,
) -> Identity:
    """The identity of the cache asked for; files of tables come from ``made``."""
    if isinstance(made, Identity):
        stages, logits = made.stages, made.logits
        tail, tail_digest = made.tail, made.tail_digest
        witnesses, witnesses_digest = made.views.witnesses, made.views.witnesses_digest
    else:
        stages = {str(stage): info for stage, info in made.stages.items()}  # type: ignore[misc]
        logits = made.logits
        tail, tail_digest = made.tail
        witnesses, witnesses_digest = made.witnesses
    shard_size = config.shard_size or default_shard_size(len(images))
    return Identity(
        teacher=teacher.spec.model_dump(mode="json"),
        precision=config.precision,
        batch_size=config.batch_size,
        request={
            "stages": list(config.stages),
            "logits": config.logits,
            "codec": str(parse_codec(config.codec)),
        },
        stages=stages,
        logits=logits,
        tail=tail,
        tail_digest=tail_digest,
        views=ViewsInfo(
            policy=policy.to_config(),
            view_size=teacher.spec.img_size,
            seed=config.seed,
            environment=pixel_environment(),
            witnesses=witnesses,
            witnesses_digest=witnesses_digest,
        ),
        data=DataInfo(
            fingerprint=images.fingerprint,
            num_samples=len(images),
            max_key_bytes=images.keys.dtype.itemsize,
            class_names=images.class_names,
        ),
        skip_corrupt=config.skip_corrupt,
        shard_size=shard_size,
        block_size=default_block_size(shard_size),
    )


def default_block_size(shard_size: int) -> int:
    """Views a block: 256, or the most below it that cut the shard into whole blocks."""
    return next(size for size in range(BLOCK_SIZE, 0, -1) if shard_size % size == 0)


def default_shard_size(num_samples: int) -> int:
    """Views a shard: about 64 shards, of 1 to 16 whole blocks.

    Small shards divide small sets among processes; large ones keep the number of files of
    ImageNet's 1.28 million samples (313 shards) and the work lost in a crash in balance.
    """
    blocks = -(-num_samples // (64 * BLOCK_SIZE))
    return BLOCK_SIZE * min(16, blocks)


def _join(
    config: CacheTeacherConfig, teacher: Teacher, images: ImageDataset, policy: ViewPolicy
) -> tuple[Plan, CacheCodecs]:
    """Read the plan in force, and make sure that it is for the job at hand."""
    plan = read_plan(config.output)
    if plan is None:
        raise EnvironmentFault(
            f"{config.output} shows no plan, though another process wrote it: is it one folder,"
            " shared by all machines?"
        )
    _check_same_job(config, teacher, images, policy, plan)
    return plan, CacheCodecs.load(config.output, plan.identity)


def _check_same_job(
    config: CacheTeacherConfig,
    teacher: Teacher,
    images: ImageDataset,
    policy: ViewPolicy,
    plan: Plan,
) -> None:
    wanted = _identity(config, teacher, images, policy, plan.identity)
    if wanted != plan.identity:
        raise CacheMismatch(
            f"{config.output} was begun for something else: {differences(plan.identity, wanted)}."
            " Give the same options to finish it, choose another --output, or pass --overwrite"
        )


@dataclass(frozen=True)
class _Work:
    """Shards that were missing when this process looked, of those that are its to do."""

    shards: list[tuple[int, int]]
    num_views: int
    num_found: int


def _divide(config: CacheTeacherConfig, writer: CacheWriter, state: PartialState) -> _Work:
    """Every process of a job takes every n-th shard, whatever is missing.

    What several jobs have in common they divide by leases, when they come to it.
    """
    identity = writer.plan.identity
    first, last = config.shards or (0, identity.num_shards - 1)
    own = range(first + state.process_index, last + 1, state.num_processes)
    shards = [
        (pass_index, shard)
        for pass_index in range(config.passes)
        for shard in writer.missing(pass_index, own)
    ]
    num_views = sum(identity.rows_of(shard) for _, shard in shards)
    return _Work(shards, num_views, config.passes * len(own) - len(shards))


def _write_shards(
    config: CacheTeacherConfig,
    writer: CacheWriter,
    codecs: CacheCodecs,
    teacher: Teacher,
    drawn: DrawnViews,
    shards: Sequence[tuple[int, int]],
    progress: ProgressReport,
) -> int:
    """Write those shards that nobody else writes; returns how many these were.

    A second round takes over what another job held during the first and died with.
    """
    with worker_faults():
        return sum(
            write_claimed(config, writer, codecs, teacher, drawn, shards, progress)
            for _ in range(2)
        )


def _elsewhere(writer: CacheWriter) -> tuple[str, ...]:
    """What other jobs were writing when this one had no more to do."""
    return tuple(
        f"shard {shard} of pass {unit}: {holder}"
        for (unit, shard), holder in sorted(writer.busy.items(), key=lambda item: str(item[0]))
        if unit != SAMPLES and not has_record(writer.root, unit, shard)
    )


def _claimed_requests(
    writer: CacheWriter, shards: Iterable[tuple[int, int]]
) -> Iterator[DrawRequest]:
    """Batches of shards, each shard claimed when its first batch is asked for."""
    identity = writer.plan.identity
    for pass_index, shard in shards:
        if writer.claim(pass_index, shard):
            yield from shard_requests(
                [(pass_index, shard)],
                num_samples=identity.data.num_samples,
                shard_size=identity.shard_size,
                batch_size=identity.batch_size,
            )


def write_claimed(
    config: CacheTeacherConfig,
    writer: CacheWriter,
    codecs: CacheCodecs,
    teacher: Teacher,
    drawn: DrawnViews,
    shards: Iterable[tuple[int, int]],
    progress: ProgressReport,
) -> int:
    """Draw, run the teacher, code and commit, shard by shard; returns the number committed."""
    missing = [pair for pair in shards if not has_record(writer.root, *pair)]
    if not missing:
        return 0
    requests = _claimed_requests(writer, missing)
    batches = drawing_loader(drawn, requests, num_workers=config.workers)
    shard: _OpenShard | None = None
    num_committed = 0
    while True:
        waiting = time.monotonic()
        batch = next(batches, None)
        progress.waited_seconds += time.monotonic() - waiting
        if batch is None:
            return num_committed
        request = batch.request
        if shard is None:
            shard = _OpenShard(writer, codecs, request)
        if batch.keys:
            shard.add(batch, run_teacher(teacher, batch.pixels, config.precision))
        shard.skipped.extend(batch.skipped)
        if request.last:
            shard.commit()
            shard = None
            num_committed += 1
        progress.advance(len(batch.keys))


class _OpenShard:
    """Gathers batches of one shard into blocks, and its small arrays until the commit."""

    def __init__(self, writer: CacheWriter, codecs: CacheCodecs, request: DrawRequest) -> None:
        self._codecs = codecs
        self._block_size = writer.plan.identity.block_size
        self._policy = ViewPolicy.from_config(writer.plan.identity.views.policy)
        self._place = f"pass {request.pass_index}, shard {request.shard}"
        self._writer = writer.shard(request.pass_index, request.shard)
        self._drawn: list[DrawnBatch] = []
        self._waiting: list[tuple[tuple[str, ...], TeacherArrays]] = []
        self.skipped: list[str] = []

    def add(self, batch: DrawnBatch, output: TeacherArrays) -> None:
        """Take a batch; write every block that is full."""
        # The pixels have done their work; holding them would hold the whole shard's.
        self._drawn.append(dataclasses.replace(batch, pixels=torch.empty(0, dtype=torch.uint8)))
        self._waiting.append((batch.keys, output))
        while sum(len(keys) for keys, _ in self._waiting) >= self._block_size:
            self._write_block(self._block_size)

    def commit(self) -> None:
        """Write the last block and commit the shard."""
        if self._waiting:
            self._write_block(sum(len(keys) for keys, _ in self._waiting))
        params = [params for batch in self._drawn for params in batch.params]
        columns = pack_views(params, self._policy)
        views = {f"view/{name}": rows for name, rows in columns.items()}
        self._writer.commit(
            SampleRows(
                keys=tuple(key for batch in self._drawn for key in batch.keys),
                labels=_joined([batch.labels for batch in self._drawn], np.int32),
                source_hashes=_joined([batch.source_hashes for batch in self._drawn], np.uint64),
            ),
            views
            | {"pixel_hash": _joined([batch.pixel_hashes for batch in self._drawn], np.uint64)},
            self.skipped,
        )

    def _write_block(self, count: int) -> None:
        keys = tuple(key for batch_keys, _ in self._waiting for key in batch_keys)
        features = {
            stage: np.concatenate([output.features[stage] for _, output in self._waiting])
            for stage in self._codecs.stages
        }
        scores = [output.logits for _, output in self._waiting if output.logits is not None]
        logits = np.concatenate(scores) if scores and self._codecs.logits else None
        rest = TeacherArrays(
            {stage: found[count:] for stage, found in features.items()},
            None if logits is None else logits[count:],
        )
        self._waiting = [(keys[count:], rest)] if len(keys) > count else []

        def encode() -> dict[str, np.ndarray[Any, Any]]:
            arrays = {}
            try:
                for stage, codec in self._codecs.stages.items():
                    for name, plane in codec.encode(features[stage][:count]).items():
                        arrays[f"stage{stage}/{name}"] = plane
                if logits is not None and self._codecs.logits:
                    for name, plane in self._codecs.logits.encode(logits[:count]).items():
                        arrays[f"logits/{name}"] = plane
            except DataError as error:
                raise DataError(
                    f"{self._place}, views of samples {keys[0]} to {keys[count - 1]}: {error}"
                ) from error
            return arrays

        self._writer.write_block(encode, count)


def _joined(parts: list[np.ndarray[Any, Any]], dtype: type) -> np.ndarray[Any, Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)
