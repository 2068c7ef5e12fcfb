"""Run the teacher once over drawn views and store its features and logits.

    scalekd cache-teacher --model swin_l --data-dir /imagenet --output ./swin_l-cache

Several processes (``torchrun``, ``accelerate launch``, or commands with ``--shards``) divide the
shards among them. The same command, run again, writes the missing shards.
"""

import importlib.metadata
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from scalekd.cache.cache import Cache
from scalekd.cache.codecs import CacheCodecs
from scalekd.cache.documents.manifest import Plan, Provenance
from scalekd.cache.files import read_checked
from scalekd.cache.tables import table_files
from scalekd.cache.writing.finishing import committed_passes, finish
from scalekd.cache.writing.planning import begin_arrays, check_form, read_plan, remove_cache
from scalekd.cache.writing.writer import CacheWriter
from scalekd.distributed import process_faults
from scalekd.errors import CacheMismatch, EnvironmentFault
from scalekd.loading import worker_faults
from scalekd.pipelines._arithmetic import strict_float32
from scalekd.pipelines._budget import Budget, choose, with_codec
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._calibrate import calibrate
from scalekd.pipelines._classes import TeacherAnswers
from scalekd.pipelines._extended import ExtendedCache
from scalekd.pipelines._job import Job, Tables
from scalekd.pipelines._preflight import tidy_and_check_space
from scalekd.pipelines._processes import Processes
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._same_pixels import check_pixels
from scalekd.pipelines._shard_division import divide
from scalekd.pipelines._write_shards import num_coding_threads, write_claimed
from scalekd.pipelines.check_replay import check_same_outputs
from scalekd.signals import terminable
from scalekd.storage import LocalStorage, Storage
from scalekd.teachers import Teacher
from scalekd.text import counted, format_cache_size
from scalekd.training.compilation import check_backend, compile_faults

__all__ = ["CacheTeacherConfig", "CacheTeacherResult", "cache_teacher", "write_cache"]

_SOFTWARE = ("scalekd", "torch", "timm", "zarr", "numcodecs", "pcodec", "numpy")


class CacheTeacherResult(BaseModel):
    """Result of a run; shards and views are those of all its processes.

    Attributes:
        output: Location of the cache.
        cache_id: Identifier of the cache.
        complete: Whether every shard of every pass is committed.
        num_samples: Number of samples of the cache.
        num_passes: Number of passes of the cache.
        num_shards: Number of shards of a pass.
        shards_written: Number of shards that this run wrote.
        shards_found: Number of shards that were committed before.
        shards_elsewhere: Shards that other jobs were still writing, each with the job.
        views_written: Number of views that this run wrote.
        skipped: Number of corrupt images that were left out.
        seconds: Duration of the writing.
        views_per_second: Views that were written per second.
        data_wait_share: Fraction of the time that was spent waiting for data.
        total_bytes: Size of the complete cache.
        fixed_bytes: Part of the size that does not depend on the number of views.
        bytes_per_view: Size per view of the rest.
        teacher_top1: Percent of the labelled views that this run wrote whose likeliest class is the
            label; ``None`` if they are not compared.
        num_labelled_views: Number of these views.
    """

    output: str
    cache_id: str
    complete: bool
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
    fixed_bytes: int | None
    bytes_per_view: float | None
    teacher_top1: float | None = None
    num_labelled_views: int = 0

    def lines(self) -> list[str]:
        """Return the lines to print."""
        state = "complete" if self.complete else "not complete: other shards are still to be done"
        if self.shards_elsewhere:
            others = len(self.shards_elsewhere) - 1
            state = (
                f"not complete: another job is writing {self.shards_elsewhere[0]}"
                + (f", and {others} more" if others else "")
                + "; the process that commits the last shard completes the cache"
            )
        lines = [
            f"{self.output}: {state}; {counted(self.num_samples, 'sample')},"
            f" {counted(self.num_passes, 'pass')}, {counted(self.num_shards, 'shard')}"
            f" ({self.shards_written} written now)",
            f"{self.views_written:,} views in {self.seconds:,.0f} s,"
            f" {self.views_per_second:,.1f} views/s, data wait {self.data_wait_share:.0%}",
        ]
        if self.total_bytes is not None:
            fixed, per_view = self.fixed_bytes or 0, self.bytes_per_view or 0
            lines.append(format_cache_size(self.total_bytes, fixed, per_view))
        if self.teacher_top1 is not None:
            lines.append(
                f"the teacher's top-1 on {self.num_labelled_views:,} labelled views is"
                f" {self.teacher_top1:.2f} %"
            )
        if self.skipped:
            lines.append(f"{self.skipped} corrupt images skipped; `scalekd cache info` lists them")
        return lines


@dataclass(frozen=True)
class CacheOrder:
    """How much of a job's cache to write, and what a new plan records beside the job.

    Attributes:
        passes: Number of passes to have in the end.
        shards: First and last shard that this command may write; ``None`` for all.
        licence: Licence of the teacher's weights; as timm records it if ``None``.
        note: Text for the manifest.
        base: The cache that is extended, if the job writes an extension.
        chosen: Whether a budget chose the number of passes.
    """

    passes: int
    shards: tuple[int, int] | None = None
    licence: str | None = None
    note: str | None = None
    base: ExtendedCache | None = None
    chosen: bool = False


@terminable()
@worker_faults()
@process_faults()
def cache_teacher(
    config: CacheTeacherConfig, *, teacher: Teacher | None = None
) -> CacheTeacherResult:
    """Write a cache, or continue one.

    Args:
        config: Options of ``scalekd cache-teacher``.
        teacher: Teacher to use instead of the one that ``config.teacher`` names, such as one from
            `scalekd.teachers.teacher_from_module`.

    Raises:
        ScaleKDError: Any fault that a user can correct; committed shards are kept.
    """
    if config.torchcompile:
        check_backend(config.torchcompile)
    if config.budget is not None:
        Budget.parse(config.budget)  # before the teacher is loaded
    processes = Processes()
    job = processes.together(lambda: Job.asked(config, processes.device, teacher=teacher))
    order = CacheOrder(config.passes, config.shards, config.licence, config.note)
    if config.budget is not None:
        job, passes = _within_budget(job, config, processes)
        chosen = "passes" not in config.model_fields_set
        order = replace(order, passes=passes, chosen=chosen)
    if config.overwrite:
        processes.on_main(lambda: remove_cache(job.output))
    elif teacher is not None:
        processes.on_main(lambda: check_same_outputs(job))
    with compile_faults(config.torchcompile):
        return write_cache(job, order, processes)


def _within_budget(job: Job, config: CacheTeacherConfig, processes: Processes) -> tuple[Job, int]:
    """Return the job with the codec, and the number of passes, that the main process chooses."""
    choice = processes.on_main(lambda: choose(job, config))
    if choice:
        processes.note(*choice.lines())
    codec, passes = processes.collect((choice.codec, choice.passes) if choice else ("", 0))[0]
    return with_codec(job, codec), passes


@strict_float32()
def write_cache(job: Job, order: CacheOrder, processes: Processes) -> CacheTeacherResult:
    """Write the missing shards of a job's cache; all processes call this together.

    Raises:
        ScaleKDError: Any fault that a user can correct; committed shards are kept.
    """
    processes.note(*job.notes)
    if order.passes > 1 and job.drawn.policy.deterministic:
        processes.note(
            f"--passes {order.passes}: all views that {job.drawn.policy} draws of an image are the"
            " same; one pass has them all"
        )
    with _folder_to_write_in(job.output) as folder:
        committed = _committed_plan(job, order, folder, processes)
        cache = processes.together(lambda: _join(job, order, committed))
        wanted = order.passes
        if order.chosen:  # another task of the same command may have chosen and begun the cache
            wanted = cache.plan.provenance.num_passes or wanted
        num_passes = max(wanted, committed_passes(cache))
        processes.on_main(lambda: _prepare(cache, num_passes))
        if cache.storage.is_remote:
            begin_arrays(folder, cache.plan, cache.layout, num_passes)
        answers = TeacherAnswers(job.match)
        with CacheWriter(
            cache,
            folder,
            num_threads=num_coding_threads(),
            approve=order.base.check_shard if order.base else None,
            computed=job.computed(),
        ) as writer:
            work = processes.together(lambda: divide(writer, order.shards, num_passes, processes))
            with ProgressReport("caching", work.num_views, enabled=processes.is_main) as progress:
                num_written = processes.together(
                    lambda: _write_shards(job, writer, cache.codecs, work.shards, progress, answers)
                )
            done = _Done(
                num_written, work.num_committed, progress.done, writer.elsewhere(), answers
            )
    all_done = processes.collect(done)
    answers = sum((done.answers for done in all_done), TeacherAnswers(job.match))
    processes.note(_warning(job, answers))
    manifest = processes.on_main(lambda: finish(cache, num_passes))
    num_views = sum(done.num_views for done in all_done)
    return CacheTeacherResult(
        output=cache.location,
        cache_id=cache.plan.cache_id,
        complete=manifest is not None,
        num_samples=cache.identity.data.num_samples,
        num_passes=num_passes,
        num_shards=cache.identity.num_shards,
        shards_written=sum(done.num_written for done in all_done),
        shards_found=sum(done.num_committed for done in all_done),
        shards_elsewhere=tuple(shard for done in all_done for shard in done.elsewhere),
        views_written=num_views,
        skipped=len(manifest.skipped) if manifest else 0,
        seconds=progress.seconds,
        views_per_second=num_views / progress.seconds,
        data_wait_share=progress.data_wait_share,
        total_bytes=manifest.total_bytes if manifest else None,
        fixed_bytes=manifest.fixed_bytes if manifest else None,
        bytes_per_view=manifest.bytes_per_view if manifest else None,
        teacher_top1=answers.top1,
        num_labelled_views=answers.num_labelled,
    )


@contextmanager
def _folder_to_write_in(output: Storage) -> Iterator[Path]:
    """Yield the folder of the cache; for a URL a temporary one, from which files are sent."""
    if output.root is not None:
        yield output.root
        return
    with tempfile.TemporaryDirectory(prefix="scalekd-") as folder:
        yield Path(folder)


def _committed_plan(job: Job, order: CacheOrder, folder: Path, processes: Processes) -> Plan | None:
    """Read the plan of the cache; if there is none, calibrate in all processes and commit one.

    Returns:
        The plan in the main process; ``None`` in the others.
    """
    # Another job may have begun the cache since the options were checked.
    plan = processes.on_main(lambda: read_plan(job.output))
    if any(processes.collect(plan is not None)):
        return plan
    base = order.base
    if base is not None:
        processes.on_main(partial(base.check, job))
    own = TeacherAnswers(job.match)
    tables = calibrate(job, folder, own, keep_tail=base is None, coordinator=processes.coordinator)
    answers = sum(processes.collect(own), TeacherAnswers(job.match))
    processes.note(_warning(job, answers))  # before the hours that the teacher takes
    return processes.together(lambda: _commit_plan(job, order, folder, tables) if tables else None)


def _commit_plan(job: Job, order: CacheOrder, folder: Path, tables: Tables) -> Plan:
    """Commit the plan of a new cache, unless another job was first; return the plan in force."""
    base = order.base
    if base is not None:  # its views are those of the cache, whichever versions draw them here
        tables = replace(tables, environment=base.identity.views.environment)
    identity = job.identity(tables)
    if base is not None:
        base.check_identity(identity)
    provenance = Provenance(
        software={name: importlib.metadata.version(name) for name in _SOFTWARE},
        computed=job.computed(),
        licence=order.licence or job.teacher.spec.licence,
        note=order.note,
        num_passes=order.passes if order.chosen else None,
        measured=tables.measured,
    )
    if job.output.is_remote:
        files = table_files(identity).items()
        calibrated = LocalStorage(folder)
        job.output.commit_all({path: read_checked(calibrated, path, d) for path, d in files})
    return Cache.begin(job.output, Plan.of(identity, provenance), job.form).plan


def _join(job: Job, order: CacheOrder, committed: Plan | None) -> Cache:
    """Open the cache in every process, and check that this job and this machine can continue it.

    Args:
        job: The job.
        order: Licence and note, which must be those of the plan.
        committed: The plan, in the process that read or committed it.
    """
    plan = committed or read_plan(job.output)
    if plan is None:
        raise EnvironmentFault(
            f"{job.output.location}: the plan that another process wrote is not visible here; give"
            " a folder that all machines share"
        )
    job.check(plan)
    for option in ("licence", "note"):
        asked, recorded = getattr(order, option), getattr(plan.provenance, option)
        if asked is not None and asked != recorded:
            raise CacheMismatch(
                f"--{option}: {job.output.location} was begun with {recorded!r}, not {asked!r}; a"
                " plan does not change: leave the option out, or pass --overwrite"
            )
    check_form(job.output, job.form)
    cache = Cache(job.output, plan, form=job.form)
    check_pixels(cache, job.drawn)
    return cache


def _prepare(cache: Cache, num_passes: int) -> None:
    """Write the metadata of all arrays, and check that the disk has room."""
    begin_arrays(cache.storage, cache.plan, cache.layout, num_passes)
    if cache.storage.root is not None:
        tidy_and_check_space(cache.storage.root, cache.plan, cache.layout, num_passes)


def _warning(job: Job, answers: TeacherAnswers) -> str:
    """Return a warning if the teacher does not recognise the labels; random weights never do."""
    return "" if job.teacher.spec.weights_source == "random" else answers.warning()


@dataclass(frozen=True)
class _Done:
    """What one process did.

    Attributes:
        num_written: Number of shards that it wrote.
        num_committed: Number of shards of its share that were committed before.
        num_views: Number of views that it wrote.
        elsewhere: Shards that other jobs were still writing, each with the job.
        answers: The teacher's answers about these views.
    """

    num_written: int
    num_committed: int
    num_views: int
    elsewhere: tuple[str, ...]
    answers: TeacherAnswers


def _write_shards(
    job: Job,
    writer: CacheWriter,
    codecs: CacheCodecs,
    shards: Sequence[tuple[int, int]],
    progress: ProgressReport,
    answers: TeacherAnswers,
) -> int:
    """Write the shards that no other command is writing; return how many this process committed.

    A second round takes over shards claimed by a command that died during the first.
    """
    return sum(write_claimed(job, writer, codecs, shards, progress, answers) for _ in range(2))
