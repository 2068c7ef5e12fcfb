"""Tables that are made from views of pass 0: codecs, their errors, prefix tokens, witnesses."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scalekd.cache.codecs import commit_codec, save_arrays, save_table, stage_info
from scalekd.cache.documents.manifest import StageInfo
from scalekd.cache.files import FileDigest
from scalekd.codecs import FeatureCodec, create_logit_codec, fit_codec, measure_errors, parse_codec
from scalekd.distributed import Coordinator
from scalekd.errors import CacheMismatch, DataError
from scalekd.loading.drawing import DrawnViews
from scalekd.pipelines._arithmetic import num_cores
from scalekd.pipelines._calibration_views import CalibrationFeatures, owners_of
from scalekd.pipelines._classes import TeacherAnswers
from scalekd.pipelines._job import Job, Tables
from scalekd.pipelines._progress import ProgressReport, doing
from scalekd.pipelines._same_pixels import draw_witnesses
from scalekd.storage import LocalStorage
from scalekd.storage.files import explained, temporary_path
from scalekd.teachers import Teacher, save_tail
from scalekd.threads import one_thread

Fitted = dict[int, tuple[FeatureCodec, dict[str, Any]]]  # codec and errors by stage
_PREFIX_VIEWS = 256  # calibration of the tail's constant prefix tokens; their mean moves little
NUM_WITNESSES = 8
_HELD_OUT_VIEWS = 128  # on which the errors of the codecs are measured
_MOST_FITTING_THREADS = 8  # as many as bands; each measures 128 views in 0.4 GB
_PARTS = ("fit", "held-out")


@one_thread()
def calibrate(
    job: Job,
    folder: Path,
    answers: TeacherAnswers | None = None,
    *,
    keep_tail: bool = True,
    coordinator: Coordinator | None = None,
) -> Tables | None:
    """Fit the codecs and the tail's prefix tokens on views of pass 0, and keep witnesses.

    All processes call this together: each runs the teacher on its share of the views, and each
    stage's codec is fitted by another process. The tables, and with them ``cache_id``, depend
    neither on the number of processes nor on that of the cores, since each computes with one
    thread and the features of a stage are used in one order.

    Args:
        job: Job that begins a cache.
        folder: Folder of the cache, to which the tables are written.
        answers: Receives the teacher's answers to the calibration views of this process.
        keep_tail: Keep the teacher's tail even if no stage is kept: students of a live teacher
            need it too.
        coordinator: The processes; this one alone if ``None``.

    Returns:
        The tables in the main process, ``None`` in the others.

    Raises:
        ScaleKDError: In all processes, if one fails.
    """
    stages = job.request.stages
    keep_tail = job.teacher.has_tail and (keep_tail or bool(stages))
    drawn = replace(job.drawn, embed="none")
    coordinator = coordinator or Coordinator(1)
    is_main = coordinator.rank == 0
    witnesses = coordinator.together(
        lambda: draw_witnesses(drawn, at_most=NUM_WITNESSES) if is_main else None
    )
    fitted = (
        _fit(job, drawn, folder, answers or TeacherAnswers(None), coordinator)
        if keep_tail or stages
        else {}
    )
    return coordinator.together(
        lambda: (
            None
            if witnesses is None
            else _commit(job, folder, witnesses, fitted, keep_tail=keep_tail)
        )
    )


def _commit(
    job: Job, folder: Path, witnesses: np.ndarray[Any, Any], fitted: Fitted, *, keep_tail: bool
) -> Tables:
    """Write the tables into the folder of the cache."""
    output = LocalStorage(folder)
    infos: dict[Literal["3", "4"], StageInfo] = {}
    measured: dict[str, Any] = {}
    for stage, (codec, errors) in fitted.items():
        name: Literal["3", "4"] = "3" if stage == 3 else "4"
        infos[name] = stage_info(codec, commit_codec(output, codec, f"stage{stage}"))
        if errors:
            measured[name] = errors
    logits, num_classes = None, job.teacher.spec.num_classes
    if job.request.logits != "none" and num_classes is not None:
        logits = commit_codec(output, create_logit_codec(job.request.logits, num_classes), "logits")
    return Tables(
        stages=infos,
        logits=logits,
        tail=_save_tail(output, job.teacher) if keep_tail else (None, None),
        witnesses=save_arrays(output, "witnesses", {"pixels": witnesses}),
        measured=measured,
    )


def num_calibration_views(job: Job) -> int:
    """Return the number of views that calibration runs the teacher on, held-out views included."""
    request, stages = parse_codec(job.request.codec), job.teacher.spec.stages
    views = [request.num_calibration_views(stages[stage]) for stage in job.request.stages]
    if stages[3].num_prefix_tokens:
        views.append(_PREFIX_VIEWS)
    if not views:
        return 0
    return min(len(job.images), max(views) + _HELD_OUT_VIEWS)


def _fit(
    job: Job, drawn: DrawnViews, output: Path, answers: TeacherAnswers, coordinator: Coordinator
) -> Fitted:
    """Fit prefix tokens and codecs; the errors are those on views held out of the fit."""
    _check_same(job, coordinator)
    kept, count = job.request.stages, num_calibration_views(job)
    if not count:
        return {}
    num_held_out = min(_HELD_OUT_VIEWS, count // 2)
    positions = np.linspace(0, len(job.images) - 1, count).astype(int)
    # Every k-th view is held out, so that both sets spread over the whole image set.
    every = -(-count // num_held_out) if num_held_out else count + 1
    is_held_out = np.arange(count) % every == every - 1
    owners = owners_of(kept, coordinator.num_processes)
    num_prefix_tokens = job.teacher.spec.stages[3].num_prefix_tokens
    with (
        ProgressReport("calibrating the codec", count, enabled=coordinator.rank == 0) as progress,
        _work_folder(output, coordinator) as folder,
    ):
        fit_on, held_out = (
            CalibrationFeatures(folder / name, owners, num_prefix_tokens, coordinator)
            for name in _PARTS
        )
        fit_on.compute(job, drawn, positions[~is_held_out], answers, progress)
        if kept:
            held_out.compute(job, drawn, positions[is_held_out], answers, progress)
        if not fit_on.num_views:
            raise DataError(f"{job.images.location}: every image of the calibration is corrupt")
        own = [stage for stage, owner in owners.items() if owner == coordinator.rank]
        fitted = coordinator.together(lambda: _fit_own(job, own, fit_on, held_out))
        everyones = coordinator.collect(fitted)
    return {stage: everyones[owner][stage] for stage, owner in owners.items()}


def _fit_own(
    job: Job, stages: list[int], fit_on: CalibrationFeatures, held_out: CalibrationFeatures
) -> Fitted:
    """Fit what this process fits: some stages, and in the main process the prefix tokens."""
    fitted: Fitted = {}
    if fit_on.entering:
        job.teacher.calibrate_prefix(fit_on.entering)
    for stage in stages:
        with doing(f"fitting the codec of stage {stage} to {fit_on.num_views:,} views"):
            codec = fit_codec(
                parse_codec(job.request.codec),
                job.teacher.spec.stages[stage],
                fit_on.blocks(stage),
                num_threads=min(num_cores(), _MOST_FITTING_THREADS),
            )
        unseen = list(held_out.blocks(stage))
        fitted[stage] = codec, _measured(codec, np.concatenate(unseen)) if unseen else {}
    return fitted


def _measured(codec: FeatureCodec, original: np.ndarray[Any, Any]) -> dict[str, Any]:
    decoded = codec.decode(codec.encode(original))
    return measure_errors(original, decoded, codec.shape).model_dump()


def _save_tail(output: LocalStorage, teacher: Teacher) -> tuple[str, FileDigest]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tail.safetensors"
        save_tail(teacher.tail(), path)
        return save_table(output, "tail", path.read_bytes())


@contextmanager
def _work_folder(output: Path, coordinator: Coordinator) -> Iterator[Path]:
    """Yield a temporary folder of this process beside the files of the cache."""
    with temporary_path(output / "calibration") as folder, explained(folder, "cannot write"):
        coordinator.together(lambda: _make_folders(folder))
        yield folder


def _make_folders(folder: Path) -> None:
    with explained(folder, "cannot write"):
        for part in _PARTS:
            (folder / part).mkdir(parents=True)


def _check_same(job: Job, coordinator: Coordinator) -> None:
    """Check that all processes read the same images and weights."""
    for what, own in (
        ("images", job.images.fingerprint),
        ("weights of the teacher", job.teacher.spec.weights_sha256),
    ):
        for rank, other in enumerate(everyones := coordinator.collect(own)):
            if other != everyones[0]:
                raise CacheMismatch(
                    f"process {rank} has other {what} than process 0 (fingerprint {other[:12]}…,"
                    f" {everyones[0][:12]}… there): give both the same files"
                )
