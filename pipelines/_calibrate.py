"""What is learnt from views of pass 0: codecs, their errors, prefix tokens, witnesses."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalekd.cache.files import FileDigest
from scalekd.cache.manifest import CodecInfo, StageInfo
from scalekd.cache.targets import save_arrays, save_codec, save_table, stage_info
from scalekd.codecs import FeatureCodec, create_logit_codec, fit_codec, measure_errors, parse_codec
from scalekd.errors import DataError
from scalekd.images.samples import ImageDataset
from scalekd.loading.drawing import DrawnBatch, DrawnViews, DrawRequest, drawing_loader
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._classes import TeacherAnswers
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._same_pixels import draw_witnesses
from scalekd.pipelines._write_shards import run_teacher
from scalekd.storage.files import explained, temporary_beside
from scalekd.teachers import Teacher, save_tail
from scalekd.threads import one_thread
from scalekd.views import ViewPolicy

_PREFIX_VIEWS = 256  # calibration of the tail's constant prefix tokens; their mean moves little
NUM_WITNESSES = 8
_HELD_OUT_VIEWS = 128  # of which the codecs' errors are measured


@dataclass(frozen=True)
class Calibration:
    """What was learnt from the calibration views, and the files it was written to."""

    stages: dict[int, StageInfo]
    logits: CodecInfo | None
    tail: tuple[str, FileDigest] | tuple[None, None]
    witnesses: tuple[str, FileDigest]
    measured_errors: dict[int, dict[str, Any]]


@one_thread()
def calibrate(
    config: CacheTeacherConfig,
    teacher: Teacher,
    images: ImageDataset,
    policy: ViewPolicy,
    answers: TeacherAnswers | None = None,
    *,
    keep_tail: bool = True,
) -> Calibration:
    """Fit the codecs and the tail's prefix tokens on views of pass 0, and keep witnesses.

    Computes with one thread, so that the tables, and with them ``cache_id``, do not depend on the
    number of cores.

    The teacher's tail is kept with any stage and, where ``keep_tail``, without one: students of a
    live teacher need it too.
    """
    keep_tail = keep_tail or bool(config.stages)
    drawn = DrawnViews(images, policy, config.seed, teacher.spec.img_size, config.skip_corrupt)
    witnesses = draw_witnesses(drawn, at_most=NUM_WITNESSES)
    answers = answers or TeacherAnswers(None)
    made = _fit(config, teacher, drawn, answers) if keep_tail else {}
    logits = None
    if config.logits not in (None, "none") and teacher.spec.num_classes is not None:
        logit_codec = create_logit_codec(config.logits, teacher.spec.num_classes)
        logits = save_codec(config.folder, logit_codec, "logits")
    return Calibration(
        stages={stage: info for stage, (info, _) in made.items()},
        logits=logits,
        tail=_save_tail(config, teacher) if keep_tail else (None, None),
        witnesses=save_arrays(config.folder, "witnesses", {"pixels": witnesses}),
        measured_errors={stage: errors for stage, (_, errors) in made.items() if errors},
    )


def num_calibration_views(config: CacheTeacherConfig, teacher: Teacher, num_images: int) -> int:
    """Views that calibration runs the teacher on, those held out to measure errors included."""
    request, stages = parse_codec(config.codec), teacher.spec.stages
    views = [request.num_calibration_views(stages[stage]) for stage in config.stages]
    if stages[3].num_prefix_tokens:
        views.append(_PREFIX_VIEWS)
    if not views:
        return 0
    wanted = max(views)
    return min(num_images, wanted + _HELD_OUT_VIEWS)


def _fit(
    config: CacheTeacherConfig, teacher: Teacher, drawn: DrawnViews, answers: TeacherAnswers
) -> dict[int, tuple[StageInfo, dict[str, Any]]]:
    """Fit prefix tokens and codecs; the errors are those on views held out of the fit."""
    request, stages = parse_codec(config.codec), teacher.spec.stages
    num_images = len(drawn.images)
    count = num_calibration_views(config, teacher, num_images)
    if not count:
        return {}
    num_held_out = min(_HELD_OUT_VIEWS, count // 2)
    positions = np.linspace(0, num_images - 1, count).astype(int)
    # Every k-th view is held out, so that both sets spread over the whole image set.
    every = -(-count // num_held_out) if num_held_out else count + 1
    is_held_out = np.arange(count) % every == every - 1
    made: dict[int, tuple[StageInfo, dict[str, Any]]] = {}
    with ProgressReport("calibrating", count) as progress, _work_folder(config.folder) as folder:
        num_prefix_tokens = stages[3].num_prefix_tokens
        fit_on = _Features(folder / "fit", config.stages, num_prefix_tokens)
        held_out = _Features(folder / "held-out", config.stages, num_prefix_tokens)
        parts = [(fit_on, ~is_held_out), (held_out, is_held_out)]
        for features, of in parts if config.stages else parts[:1]:
            for batch in _batches(config, drawn, positions[of]):
                output = run_teacher(teacher, batch.pixels, config.precision)
                features.add(output.features)
                answers.add(output.logits, batch.labels)
                progress.advance(len(batch.keys))
        if not fit_on.num_views:
            raise DataError(f"{drawn.images.place}: every image of the calibration is corrupt")
        teacher.calibrate_prefix(fit_on.entering)
        for stage in config.stages:
            codec = fit_codec(request, stages[stage], fit_on.blocks(stage))
            info = stage_info(codec, save_codec(config.folder, codec, f"stage{stage}"))
            unseen = list(held_out.blocks(stage))
            made[stage] = (info, _measured(codec, np.concatenate(unseen)) if unseen else {})
    return made


def _measured(codec: FeatureCodec, original: np.ndarray[Any, Any]) -> dict[str, Any]:
    decoded = codec.decode(codec.encode(original))
    return measure_errors(original, decoded, codec.shape).to_json()


def _save_tail(config: CacheTeacherConfig, teacher: Teacher) -> tuple[str, FileDigest]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tail.safetensors"
        save_tail(teacher.tail(), path)
        return save_table(config.folder, "tail", path.read_bytes())


def _batches(
    config: CacheTeacherConfig, drawn: DrawnViews, positions: np.ndarray[Any, Any]
) -> Iterator[DrawnBatch]:
    requests = [
        DrawRequest(0, 0, tuple(int(p) for p in positions[start : start + config.batch_size]))
        for start in range(0, len(positions), config.batch_size)
    ]
    for batch in drawing_loader(drawn, requests, num_workers=config.workers):
        if batch.keys:  # else every image of it was corrupt
            yield batch


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A folder beside the cache's files; one that a killed process left is tidied up later."""
    folder = temporary_beside(output / "calibration")
    with explained(folder, "cannot write"):
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Features:
    """What the teacher said, on disk: codecs are fitted stage by stage, the teacher runs once.

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
