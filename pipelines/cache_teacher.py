"""Stage one: run the teacher once over drawn views and keep its features and logits.

    scalekd cache-teacher --model swin_l --data-dir /imagenet --output ./swin_l-cache

Every process (``torchrun``, ``accelerate launch``, or several commands with ``--shards``) takes
shards of its own. Running the same command again finishes what is missing.
"""

import importlib.metadata
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from pydantic import BaseModel

from scalekd.cache.cache import Cache
from scalekd.cache.codecs import CacheCodecs
from scalekd.cache.documents.manifest import Identity, Plan, Provenance
from scalekd.cache.files import read_checked
from scalekd.cache.tables import table_files
from scalekd.cache.writing.finishing import committed_passes, finish
from scalekd.cache.writing.planning import (
    begin,
    begin_form,
    check_form,
    commit_plan,
    read_plan,
    remove_cache,
)
from scalekd.cache.writing.writer import CacheWriter
from scalekd.distributed import process_faults
from scalekd.errors import CacheMismatch, EnvironmentFault
from scalekd.loading import worker_faults
from scalekd.pipelines._arithmetic import strict_float32
from scalekd.pipelines._budget import choose, with_codec
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._calibrate import calibrate
from scalekd.pipelines._classes import TeacherAnswers
from scalekd.pipelines._extended import ExtendedCache
from scalekd.pipelines._job import Job, Tables
from scalekd.pipelines._preflight import tidy_and_check_space
from scalekd.pipelines._processes import Processes
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._same_pixels import check_pixels
from scalekd.pipelines._write_shards import num_coding_threads, write_claimed
from scalekd.signals import terminable
from scalekd.storage import LocalStorage, Storage, open_storage
from scalekd.teachers import Teacher
from scalekd.text import format_cache_size
from scalekd.training.compilation import check_backend, compile_faults

__all__ = ["CacheTeacherConfig", "CacheTeacherResult", "cache_teacher", "write_cache"]

_SOFTWARE = ("scalekd", "torch", "timm", "zarr", "numcodecs", "pcodec", "numpy")


class CacheTeacherResult(BaseModel):
    """What a run did: counts, bytes, seconds. Shards and views are those of all processes.

    ``shards_elsewhere`` names the shards that other jobs were still writing, and those jobs.
    ``teacher_top1`` is in percent of the labelled views that were written now.
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
            f"{self.output}: {state}; {self.num_samples:,} samples, {self.num_passes} passes,"
            f" {self.num_shards} shards ({self.shards_written} written now)",
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
    """Where a job writes its cache, and how much of it.

    Attributes:
        output: Folder or URL of the cache.
        passes: Passes to have in the end.
        shards: First and last shard that this command may do; all when ``None``.
        licence: Licence of the teacher's weights; what timm says of published ones when ``None``.
        note: Free text for the manifest.
        base: The cache that is extended, where this is an extension of one.
        chosen: Whether a budget chose the number of passes.
    """

    output: str | Path
    passes: int
    shards: tuple[int, int] | None = None
    licence: str | None = None
    note: str | None = None
    base: ExtendedCache | None = None
    chosen: bool = False

    @cached_property
    def storage(self) -> Storage:
        """Where the cache is."""
        return open_storage(self.output)


@terminable()
@worker_faults()
@process_faults()
def cache_teacher(
    config: CacheTeacherConfig, *, teacher: Teacher | None = None
) -> CacheTeacherResult:
    """Write a cache, or finish one.

    Args:
        config: What to write.
        teacher: The teacher itself, such as one from `scalekd.teachers.teacher_from_module`,
            instead of the one that ``config.teacher`` names.

    Raises:
        ScaleKDError: Anything a user can mend; what was committed is kept.
    """
    if config.torchcompile:
        check_backend(config.torchcompile)
    processes = Processes()
    job = processes.together(lambda: Job.asked(config, processes.device, teacher=teacher))
    order = CacheOrder(config.output, config.passes, config.shards, config.licence, config.note)
    if config.budget is not None:
        job, passes = _within_budget(job, config, processes)
        order = replace(order, passes=passes, chosen=True)
    if config.overwrite:
        processes.on_main(lambda: remove_cache(config.output))
    with compile_faults(config.torchcompile):
        return write_cache(job, order, processes)


def _within_budget(job: Job, config: CacheTeacherConfig, processes: Processes) -> tuple[Job, int]:
    """The job with the codec, and the number of passes, that the main process chooses."""
    choice = processes.on_main(lambda: choose(job, config))
    for line in choice.lines() if choice else ():
        processes.note(line)
    chosen = processes.collect((choice.codec, choice.passes) if choice else ("", 0))
    codec, passes = max(chosen, key=lambda pair: pair[1])  # the main process's
    return with_codec(job, codec), passes


@strict_float32()
def write_cache(job: Job, order: CacheOrder, processes: Processes) -> CacheTeacherResult:
    """Do what is missing of a job's cache; all processes call this together.

    Raises:
        ScaleKDError: Anything a user can mend; what was committed is kept.
    """
    for line in job.notes:
        processes.note(line)
    storage = order.storage
    with _folder_to_write_in(storage) as folder:
        begun = _begin(job, order, folder, processes)
        cache = processes.together(lambda: _join(job, order, begun))
        plan = cache.plan
        num_passes = max(order.passes, committed_passes(cache))
        processes.on_main(lambda: _prepare(cache, num_passes))
        if storage.is_remote:
            begin(folder, plan, cache.layout, num_passes)
        answers = TeacherAnswers(job.match)
        with CacheWriter(
            cache,
            folder,
            num_threads=num_coding_threads(),
            approve=order.base.check_shard if order.base else None,
            computed=job.computed(),
        ) as writer:
            work = processes.together(lambda: _divide(writer, order.shards, num_passes, processes))
            with ProgressReport("caching", work.num_views, enabled=processes.is_main) as progress:
                num_written = processes.together(
                    lambda: _write_shards(
                        job, writer, cache.codecs, [*work.shards, *work.others], progress, answers
                    )
                )
            elsewhere = writer.elsewhere()
    counts = processes.collect((num_written, work.num_found, progress.done, elsewhere))
    answers = sum(processes.collect(answers), TeacherAnswers(job.match))
    processes.note(_warning(job, answers))
    manifest = processes.on_main(lambda: finish(cache, num_passes))
    num_views = sum(views for _, _, views, _ in counts)
    return CacheTeacherResult(
        output=str(order.output),
        cache_id=plan.cache_id,
        complete=manifest is not None,
        num_samples=plan.identity.data.num_samples,
        num_passes=num_passes,
        num_shards=plan.identity.num_shards,
        shards_written=sum(written for written, _, _, _ in counts),
        shards_found=sum(present for _, present, _, _ in counts),
        shards_elsewhere=tuple(line for _, _, _, lines in counts for line in lines),
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
def _folder_to_write_in(storage: Storage) -> Iterator[Path]:
    """The folder of the cache; for a URL a temporary one, whose files are sent."""
    if storage.root is not None:
        yield storage.root
        return
    with tempfile.TemporaryDirectory(prefix="scalekd-") as folder:
        yield Path(folder)


def _begin(job: Job, order: CacheOrder, folder: Path, processes: Processes) -> Plan | None:
    """Read the plan, or calibrate and commit one, in all processes; the main one returns it."""
    plan = processes.on_main(lambda: read_plan(order.storage))
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
    storage, base = order.storage, order.base
    if base is not None:  # its views are those of the cache, whatever draws them here
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
    begin_form(storage, job.form)
    if storage.is_remote:
        _send_tables(folder, storage, identity)
    return commit_plan(storage, Plan.of(identity, provenance))


def _send_tables(folder: Path, storage: Storage, identity: Identity) -> None:
    """Send the tables; their names are made from their content, so none is replaced by another."""
    tables = table_files(identity).items()
    storage.commit_all({path: read_checked(LocalStorage(folder), path, d) for path, d in tables})


def _join(job: Job, order: CacheOrder, begun: Plan | None) -> Cache:
    """Check, in every process, that the plan in force is that of the job and can be met here.

    Args:
        job: The job.
        order: Where its cache is.
        begun: The plan, in the process that began the cache.
    """
    storage = order.storage
    plan = begun or read_plan(storage)
    if plan is None:
        raise EnvironmentFault(
            f"{order.output} shows no plan, though another process wrote it: is it one folder,"
            " shared by all machines?"
        )
    job.check(plan, order.output)
    for option in ("licence", "note"):
        asked, committed = getattr(order, option), getattr(plan.provenance, option)
        if asked is not None and asked != committed:
            raise CacheMismatch(
                f"--{option}: {order.output} was begun with {committed!r}, and {asked!r} is asked"
                " for; a plan does not change: leave the option out, or pass --overwrite"
            )
    check_form(storage, job.form)
    cache = Cache(storage, plan)
    check_pixels(cache, job.drawn)
    return cache


def _prepare(cache: Cache, num_passes: int) -> None:
    """Write the metadata of all arrays, and look for room on the disk."""
    storage, plan, layout = cache.storage, cache.plan, cache.layout
    begin(storage, plan, layout, num_passes)
    if storage.root is not None:
        tidy_and_check_space(storage.root, plan, layout, num_passes)


def _warning(job: Job, answers: TeacherAnswers) -> str:
    """What the teacher's answers say about its classes; random weights know none."""
    return "" if job.teacher.spec.weights_source == "random" else answers.warning()


@dataclass(frozen=True)
class _Work:
    """What this process is to do.

    Attributes:
        shards: Of its own share, those that were missing when it looked.
        others: Shards of the other processes, to take over when its own are done.
        num_views: Views of ``shards``.
        num_found: Shards of its own share that were committed before.
    """

    shards: list[tuple[int, int]]
    others: list[tuple[int, int]]
    num_views: int
    num_found: int


def _divide(
    writer: CacheWriter, shards: tuple[int, int] | None, num_passes: int, processes: Processes
) -> _Work:
    """Give every process a share of the shards, by number, and then what is left of the others'.

    Leases see to it that each is written once; there are none where files are sent to a URL.
    """
    identity = writer.plan.identity
    first, last = shards or (0, identity.num_shards - 1)
    every = [
        (pass_index, shard) for pass_index in range(num_passes) for shard in range(first, last + 1)
    ]
    own = every[processes.index :: processes.count]
    missing = [
        (pass_index, shard)
        for pass_index, group in itertools.groupby(own, key=lambda pair: pair[0])
        for shard in writer.missing(pass_index, [shard for _, shard in group])
    ]
    others = []
    if not writer.is_remote:  # from the end, which their owners come to last
        mine = set(own)
        others = [pair for pair in reversed(every) if pair not in mine]
    num_views = sum(identity.rows_of(shard) for _, shard in missing)
    return _Work(missing, others, num_views, len(own) - len(missing))


def _write_shards(
    job: Job,
    writer: CacheWriter,
    codecs: CacheCodecs,
    shards: Sequence[tuple[int, int]],
    progress: ProgressReport,
    answers: TeacherAnswers,
) -> int:
    """Write those shards that no other command writes; returns how many these were.

    A second round takes over what another command held during the first and died with.
    """
    return sum(write_claimed(job, writer, codecs, shards, progress, answers) for _ in range(2))
