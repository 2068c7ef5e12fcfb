"""Stage one: run the teacher once over drawn views and keep what it says.

    scalekd cache-teacher --model swin_l --data-dir /imagenet --output ./swin_l-cache

Every process (``torchrun``, ``accelerate launch``, or several commands with ``--shards``) takes
shards of its own. Running the same command again finishes what is missing.
"""

import importlib.metadata
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from pydantic import BaseModel, Field

from scalekd.cache.files import read_checked
from scalekd.cache.finishing import committed_passes, finish
from scalekd.cache.manifest import Identity, Plan, Provenance
from scalekd.cache.planning import (
    begin,
    begin_form,
    commit_plan,
    differences,
    read_plan,
    remove_cache,
)
from scalekd.cache.tables import table_files
from scalekd.cache.targets import CacheCodecs
from scalekd.cache.writer import CacheWriter
from scalekd.distributed import Coordinator
from scalekd.errors import CacheMismatch, EnvironmentFault
from scalekd.images.samples import ImageDataset
from scalekd.loading import worker_faults
from scalekd.loading.drawing import DrawnViews
from scalekd.models.classes import ClassMatch
from scalekd.pipelines._arithmetic import strict_float32
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._calibrate import calibrate
from scalekd.pipelines._classes import (
    TeacherAnswers,
    match_labels,
    stored_map,
    with_logits,
)
from scalekd.pipelines._identity import wanted_identity
from scalekd.pipelines._notes import note
from scalekd.pipelines._preflight import preflight, tidy_and_check_space, with_precision
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._same_pixels import check_pixels
from scalekd.pipelines._signals import terminable
from scalekd.pipelines._write_shards import num_coding_threads, write_claimed
from scalekd.storage import LocalStorage, Storage, is_remote, open_storage
from scalekd.teachers import ABOUT_ORIGIN, Teacher, load_teacher
from scalekd.training.compilation import check_backend, compile_faults
from scalekd.views import ViewPolicy

__all__ = ["CacheTeacherConfig", "CacheTeacherResult", "cache_teacher"]

T = TypeVar("T")
Rows = np.ndarray[Any, Any]
_SOFTWARE = ("scalekd", "torch", "timm", "zarr", "numcodecs", "pcodec", "numpy")


class CacheTeacherResult(BaseModel):
    """What a run did: counts, bytes, seconds. Shards and views are those of all processes.

    ``shards_elsewhere`` names the shards that other jobs were still writing, and those jobs.
    ``teacher_top1`` is in percent of the labelled views that were written now.
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
    teacher_top1: float | None = None
    num_labelled_views: int = 0


class Surroundings(Protocol):
    """A cache that the one being written is to fit."""

    @property
    def identity(self) -> Identity:
        """Its own."""

    def check_plan(self, wanted: Identity) -> None:
        """Raise ``CacheMismatch`` unless this may be written."""

    def check_pixels(self, drawn: DrawnViews) -> None:
        """Raise ``CacheMismatch`` unless this machine draws the views of that cache."""

    def check_shard(self, unit: int, shard: int, samples_sha256: str, pixel_hashes: Rows) -> None:
        """Raise ``CacheMismatch`` unless a shard may be committed."""


@terminable()
@worker_faults()
def cache_teacher(
    config: CacheTeacherConfig, *, around: Surroundings | None = None
) -> CacheTeacherResult:
    """Write a cache, or finish one.

    Args:
        config: What to write.
        around: What it has to fit, when it is an extension of another cache.

    Raises:
        ScaleKDError: Anything a user can mend; what was committed is kept.
    """
    if config.torchcompile:
        check_backend(config.torchcompile)
    with strict_float32(), compile_faults(config.torchcompile):
        if not is_remote(config.output):
            return _cache_teacher(config, around)
        with tempfile.TemporaryDirectory(prefix="scalekd-") as folder:
            return _cache_teacher(config.model_copy(update={"work_folder": Path(folder)}), around)


def _cache_teacher(config: CacheTeacherConfig, around: Surroundings | None) -> CacheTeacherResult:
    # Accelerate starts gloo for processes on CPUs only when told that CPUs are meant.
    state = PartialState(cpu=not torch.accelerator.is_available())
    everyone = Coordinator(state.num_processes)

    def on_main(work: Callable[[], T]) -> T | None:
        """Run on the main process alone; all go on together, or fail together."""
        return everyone.together(lambda: work() if state.is_main_process else None)

    def tell(line: str) -> None:
        if line and state.is_main_process:
            note(line)

    images, policy, data = everyone.together(lambda: preflight(config))
    for line in images.notes:
        tell(line)
    config = everyone.together(lambda: with_precision(config, state.device))
    teacher = everyone.together(lambda: load_teacher(config.teacher).to(state.device))
    if config.torchcompile:
        teacher.compile(backend=config.torchcompile)
    config, line = everyone.together(lambda: with_logits(config, teacher))
    tell(line)
    existing = None if config.overwrite else everyone.together(lambda: read_plan(config.output))
    match = everyone.together(lambda: match_labels(config, teacher, data, existing))
    tell((match.note if match is not None else None) or "")
    if config.overwrite:
        on_main(lambda: remove_cache(config.output))
    on_main(lambda: _prepare(config, teacher, images, policy, match, around))
    plan, codecs = everyone.together(lambda: _join(config, teacher, images, policy))
    config = config.model_copy(
        update={"passes": max(config.passes, committed_passes(config.output, plan))}
    )
    layout = codecs.layout(plan.identity)
    on_main(lambda: tidy_and_check_space(config, plan, layout))
    place = None
    if config.work_folder is not None:
        place = open_storage(config.output)
        begin(config.work_folder, plan, layout, config.passes)
    approve = around.check_shard if around else None
    answers = TeacherAnswers(match)
    threads = num_coding_threads()
    with CacheWriter(
        config.folder, plan, layout, num_threads=threads, approve=approve, place=place
    ) as writer:
        work = everyone.together(lambda: _divide(config, writer, state))
        drawn = _drawn_views(config, teacher, images, policy)
        with ProgressReport("caching", work.num_views, enabled=state.is_main_process) as progress:
            num_written = everyone.together(
                lambda: _write_shards(
                    config,
                    writer,
                    codecs,
                    teacher,
                    drawn,
                    [*work.shards, *work.others],
                    progress,
                    answers,
                )
            )
        elsewhere = writer.elsewhere()
    counts = everyone.collect((num_written, work.num_found, progress.done, elsewhere))
    num_views = sum(views for _, _, views, _ in counts)
    answers = sum(everyone.collect(answers), TeacherAnswers(match))
    if teacher.spec.weights_source != "random":
        tell(answers.warning())
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
        teacher_top1=answers.top1,
        num_labelled_views=answers.num_labelled,
    )


def _prepare(
    config: CacheTeacherConfig,
    teacher: Teacher,
    images: ImageDataset,
    policy: ViewPolicy,
    match: ClassMatch | None,
    around: Surroundings | None,
) -> None:
    """Calibrate and begin the cache, unless it was begun before, and then for this very job."""
    plan = read_plan(config.output)
    if plan is None:
        if around is not None:  # before the teacher is asked for calibration
            around.check_plan(wanted_identity(config, teacher, images, policy, around.identity))
            around.check_pixels(_drawn_views(config, teacher, images, policy))
        answers = TeacherAnswers(match)
        keep_tail = around is None
        calibration = calibrate(config, teacher, images, policy, answers, keep_tail=keep_tail)
        if teacher.spec.weights_source != "random" and (warning := answers.warning()):
            note(warning)  # before the hours that the teacher takes
        identity = wanted_identity(
            config,
            teacher,
            images,
            policy,
            calibration,
            environment=around.identity.views.environment if around else None,
            class_map=stored_map(config, match),
        )
        if around is not None:
            around.check_plan(identity)
        software = {name: importlib.metadata.version(name) for name in _SOFTWARE}
        plan = Plan.of(
            identity,
            Provenance(
                software=software,
                licence=config.licence or teacher.spec.licence,
                note=config.note,
                measured={
                    str(stage): errors for stage, errors in calibration.measured_errors.items()
                },
            ),
        )
        begin_form(config.output, config.form)
        if config.work_folder is not None:
            _send_tables(config.work_folder, open_storage(config.output), identity)
        plan = commit_plan(config.output, plan)
    _check_same_job(config, teacher, images, policy, plan)
    begin_form(config.output, config.form)
    layout = CacheCodecs.load(config.output, plan.identity).layout(plan.identity)
    drawn = _drawn_views(config, teacher, images, policy)
    check_pixels(open_storage(config.output), plan, layout, drawn)
    begin(config.output, plan, layout, config.passes)


def _send_tables(folder: Path, place: Storage, identity: Identity) -> None:
    """Their names are made from their content, so that none is ever replaced by another."""
    tables = table_files(identity).items()
    place.commit_all({path: read_checked(LocalStorage(folder), path, d) for path, d in tables})


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
    codecs = CacheCodecs.load(config.output, plan.identity)
    drawn = _drawn_views(config, teacher, images, policy)
    check_pixels(open_storage(config.output), plan, codecs.layout(plan.identity), drawn)
    return plan, codecs


def _drawn_views(
    config: CacheTeacherConfig, teacher: Teacher, images: ImageDataset, policy: ViewPolicy
) -> DrawnViews:
    return DrawnViews(
        images,
        policy,
        config.seed,
        teacher.spec.img_size,
        skip_corrupt=config.skip_corrupt,
        embed=config.embed,
    )


def _check_same_job(
    config: CacheTeacherConfig,
    teacher: Teacher,
    images: ImageDataset,
    policy: ViewPolicy,
    plan: Plan,
) -> None:
    committed = plan.identity
    wanted = wanted_identity(
        config, teacher, images, policy, committed, class_map=committed.class_map
    )
    if wanted.teacher["weights_sha256"] == committed.teacher["weights_sha256"]:
        # The same weights by another name, such as that of a folder of this machine.
        origin = {n: v for n, v in committed.teacher.items() if n in ABOUT_ORIGIN}
        own = {n: v for n, v in wanted.teacher.items() if n not in ABOUT_ORIGIN}
        wanted = wanted.model_copy(update={"teacher": own | origin})
    if wanted != plan.identity:
        raise CacheMismatch(
            f"{config.output} was begun for something else: {differences(plan.identity, wanted)}."
            " Give the same options to finish it, choose another --output, or pass --overwrite"
        )
    names = config.teacher.class_names
    if names is not None and list(names) != committed.teacher.get("class_names"):
        raise CacheMismatch(
            f"--teacher-classes: {config.output} was begun with other names of the teacher's"
            " classes; leave the option out, choose another --output, or pass --overwrite"
        )
    for option in ("licence", "note"):
        asked, stands = getattr(config, option), getattr(plan.provenance, option)
        if asked is not None and asked != stands:
            raise CacheMismatch(
                f"--{option}: {config.output} was begun with {stands!r}, and {asked!r} is asked"
                " for; a plan does not change: leave the option out, or pass --overwrite"
            )


@dataclass(frozen=True)
class _Work:
    """What this process is to do.

    Attributes:
        shards: Of its own share, those that were missing when it looked.
        others: Shards of the other processes, to take over when its own are done.
        num_views: Of ``shards``.
        num_found: Shards of its own share that were committed before.
    """

    shards: list[tuple[int, int]]
    others: list[tuple[int, int]]
    num_views: int
    num_found: int


def _divide(config: CacheTeacherConfig, writer: CacheWriter, state: PartialState) -> _Work:
    """A share of the shards for every process, by number, and then whatever is left of others'.

    Leases see to it that each is written once; there are none where files are sent to a URL.
    """
    identity = writer.plan.identity
    first, last = config.shards or (0, identity.num_shards - 1)
    every = [
        (pass_index, shard)
        for pass_index in range(config.passes)
        for shard in range(first, last + 1)
    ]
    own = every[state.process_index :: state.num_processes]
    shards = [
        (pass_index, shard)
        for pass_index, group in itertools.groupby(own, key=lambda pair: pair[0])
        for shard in writer.missing(pass_index, [shard for _, shard in group])
    ]
    others = []
    if writer.place is writer.folder:  # from the end, which their owners come to last
        others = [pair for pair in reversed(every) if pair not in set(own)]
    num_views = sum(identity.rows_of(shard) for _, shard in shards)
    return _Work(shards, others, num_views, len(own) - len(shards))


def _write_shards(
    config: CacheTeacherConfig,
    writer: CacheWriter,
    codecs: CacheCodecs,
    teacher: Teacher,
    drawn: DrawnViews,
    shards: Sequence[tuple[int, int]],
    progress: ProgressReport,
    answers: TeacherAnswers,
) -> int:
    """Write those shards that nobody else writes; returns how many these were.

    A second round takes over what another job held during the first and died with.
    """
    with worker_faults():
        return sum(
            write_claimed(config, writer, codecs, teacher, drawn, shards, progress, answers)
            for _ in range(2)
        )
