"""Tables that are made from views of pass 0: codecs, their errors, prefix tokens, witnesses."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scalekd.cache.codecs import commit_codec, save_arrays, save_table, stage_info
from scalekd.cache.documents.manifest import StageInfo
from scalekd.cache.files import FileDigest
from scalekd.codecs import FeatureCodec, create_logit_codec, fit_codec, measure_errors, parse_codec
from scalekd.errors import DataError
from scalekd.loading.drawing import DrawnBatch, DrawnViews, DrawRequest, drawing_loader
from scalekd.pipelines._classes import TeacherAnswers
from scalekd.pipelines._job import Job, Tables
from scalekd.pipelines._progress import ProgressReport, doing
from scalekd.pipelines._same_pixels import draw_witnesses
from scalekd.pipelines._write_shards import run_teacher
from scalekd.storage.files import explained, temporary_path
from scalekd.teachers import Teacher, save_tail
from scalekd.threads import one_thread

_PREFIX_VIEWS = 256  # calibration of the tail's constant prefix tokens; their mean moves little
NUM_WITNESSES = 8
_HELD_OUT_VIEWS = 128  # of which the codecs' errors are measured


@one_thread()
def calibrate(
    job: Job, folder: Path, answers: TeacherAnswers | None = None, *, keep_tail: bool = True
) -> Tables:
    """Fit the codecs and the tail's prefix tokens on views of pass 0, and keep witnesses.

    Computes with one thread, so that the tables, and with them ``cache_id``, do not depend on the
    number of cores.

    Args:
        job: What is to be cached.
        folder: Where the tables are written, in the layout of a cache.
        answers: Receives the teacher's answers to the calibration views.
        keep_tail: Keep the teacher's tail even if no stage is kept: students of a live teacher
            need it too.
    """
    stages = job.request.stages
    keep_tail = job.teacher.has_tail and (keep_tail or bool(stages))
    drawn = replace(job.drawn, embed="none")
    witnesses = draw_witnesses(drawn, at_most=NUM_WITNESSES)
    answers = answers or TeacherAnswers(None)
    fitted = _fit(job, drawn, folder, answers) if keep_tail or stages else {}
    logits, num_classes = None, job.teacher.spec.num_classes
    if job.request.logits != "none" and num_classes is not None:
        logits = commit_codec(folder, create_logit_codec(job.request.logits, num_classes), "logits")
    return Tables(
        stages={stage: info for stage, (info, _) in fitted.items()},
        logits=logits,
        tail=_save_tail(folder, job.teacher) if keep_tail else (None, None),
        witnesses=save_arrays(folder, "witnesses", {"pixels": witnesses}),
        measured={stage: errors for stage, (_, errors) in fitted.items() if errors},
    )


def num_calibration_views(job: Job) -> int:
    """Views that calibration runs the teacher on, those held out to measure errors included."""
    request, stages = parse_codec(job.request.codec), job.teacher.spec.stages
    views = [request.num_calibration_views(stages[stage]) for stage in job.request.stages]
    if stages[3].num_prefix_tokens:
        views.append(_PREFIX_VIEWS)
    if not views:
        return 0
    return min(len(job.images), max(views) + _HELD_OUT_VIEWS)


def _fit(
    job: Job, drawn: DrawnViews, output: Path, answers: TeacherAnswers
) -> dict[Literal["3", "4"], tuple[StageInfo, dict[str, Any]]]:
    """Fit prefix tokens and codecs; the errors are those on views held out of the fit."""
    stages, kept = job.teacher.spec.stages, job.request.stages
    count = num_calibration_views(job)
    if not count:
        return {}
    num_held_out = min(_HELD_OUT_VIEWS, count // 2)
    positions = np.linspace(0, len(job.images) - 1, count).astype(int)
    # Every k-th view is held out, so that both sets spread over the whole image set.
    every = -(-count // num_held_out) if num_held_out else count + 1
    is_held_out = np.arange(count) % every == every - 1
    fitted: dict[Literal["3", "4"], tuple[StageInfo, dict[str, Any]]] = {}
    with ProgressReport("calibrating the codec", count) as progress, _work_folder(output) as folder:
        num_prefix_tokens = stages[3].num_prefix_tokens
        fit_on = _Features(folder / "fit", kept, num_prefix_tokens)
        held_out = _Features(folder / "held-out", kept, num_prefix_tokens)
        parts = [(fit_on, ~is_held_out), (held_out, is_held_out)]
        for features, of in parts if kept else parts[:1]:
            for batch in _batches(job, drawn, positions[of]):
                output_arrays = run_teacher(job.teacher, batch.pixels, job.precision)
                features.add(output_arrays.features)
                answers.add(output_arrays.logits, batch.labels)
                progress.advance(len(batch.keys))
        if not fit_on.num_views:
            raise DataError(f"{job.images.location}: every image of the calibration is corrupt")
        job.teacher.calibrate_prefix(fit_on.entering)
        request = parse_codec(job.request.codec)
        for stage in kept:
            with doing(f"fitting the codec of stage {stage} to {fit_on.num_views:,} views"):
                codec = fit_codec(request, stages[stage], fit_on.blocks(stage))
            info = stage_info(codec, commit_codec(output, codec, f"stage{stage}"))
            unseen = list(held_out.blocks(stage))
            name: Literal["3", "4"] = "3" if stage == 3 else "4"
            fitted[name] = (info, _measured(codec, np.concatenate(unseen)) if unseen else {})
    return fitted


def _measured(codec: FeatureCodec, original: np.ndarray[Any, Any]) -> dict[str, Any]:
    decoded = codec.decode(codec.encode(original))
    return measure_errors(original, decoded, codec.shape).model_dump()


def _save_tail(output: Path, teacher: Teacher) -> tuple[str, FileDigest]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tail.safetensors"
        save_tail(teacher.tail(), path)
        return save_table(output, "tail", path.read_bytes())


def _batches(job: Job, drawn: DrawnViews, positions: np.ndarray[Any, Any]) -> Iterator[DrawnBatch]:
    requests = [
        DrawRequest(0, 0, tuple(int(p) for p in positions[start : start + job.batch_size]))
        for start in range(0, len(positions), job.batch_size)
    ]
    for batch in drawing_loader(drawn, requests, num_workers=job.workers):
        if batch.keys:  # else every image of it was corrupt
            yield batch


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the files of the cache."""
    with temporary_path(output / "calibration") as folder, explained(folder, "cannot write"):
        folder.mkdir(parents=True)
        yield folder


class _Features:
    """The teacher's features, on disk: codecs are fitted stage by stage, the teacher runs once.

    Swin-L's 5,000 calibration views take 4.5 GB.

    Attributes:
        entering: Prefix tokens that enter the tail, ``(view, prefix, channel)`` a batch.
        num_views: Views added.
    """

    def __init__(self, folder: Path, stages: Sequence[int], num_prefix_tokens: int) -> None:
        folder.mkdir()
        self._files = {stage: folder / f"stage{stage}" for stage in stages}
        self._num_prefix_tokens = num_prefix_tokens
        self.entering: list[Tensor] = []
        self.num_views = 0

    def add(self, features: dict[int, np.ndarray[Any, Any]]) -> None:
        """Append a batch."""
        self.num_views += len(features[3])
        self.entering.append(torch.from_numpy(features[3][:, : self._num_prefix_tokens].copy()))
        for stage, path in self._files.items():
            with path.open("ab") as file:
                np.save(file, features[stage])

    def blocks(self, stage: int) -> Iterator[np.ndarray[Any, Any]]:
        """The batches, in order."""
        if not self.entering:
            return  # every image was corrupt
        with self._files[stage].open("rb") as file:
            for _ in self.entering:
                yield np.load(file)
