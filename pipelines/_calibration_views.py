"""The teacher's features of calibration views: all processes compute them, batch by batch.

The process that fits the codec of a stage receives the features of that stage in the order of the
batches, so that its tables are those of a run with one process.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalekd.distributed import Coordinator
from scalekd.loading.drawing import DrawnViews, DrawRequest, drawing_loader
from scalekd.pipelines._classes import TeacherAnswers
from scalekd.pipelines._job import Job
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._teacher_stream import TeacherArrays
from scalekd.pipelines._write_shards import run_teacher

_MAIN = 0  # the process that needs the prefix tokens


class CalibrationFeatures:
    """Features of some calibration views, on disk: the teacher runs once for all stages.

    Swin-L's 6,000 calibration views take 5.4 GB.

    Args:
        folder: An empty folder for the features.
        owners: Process that receives the features of each stage.
        num_prefix_tokens: Number of prefix tokens of stage 3.
        coordinator: The processes.

    Attributes:
        entering: Prefix tokens that enter the tail, ``(view, prefix, channel)`` per batch; in the
            main process only.
        num_views: Views added, in all processes.
    """

    def __init__(
        self,
        folder: Path,
        owners: dict[int, int],
        num_prefix_tokens: int,
        coordinator: Coordinator,
    ) -> None:
        self._folder = folder
        self._owners = owners
        self._num_prefix_tokens = num_prefix_tokens
        self._coordinator = coordinator
        self._num_batches = 0
        self.entering: list[Tensor] = []
        self.num_views = 0

    def compute(
        self,
        job: Job,
        drawn: DrawnViews,
        positions: np.ndarray[Any, Any],
        answers: TeacherAnswers,
        progress: ProgressReport,
    ) -> None:
        """Draw views and run the teacher on them; all processes call this together.

        Args:
            job: The job.
            drawn: Draws the views.
            positions: Positions of the samples in the image set.
            answers: Receives the teacher's answers to the views of this process.
            progress: Counts the views of all processes.
        """
        requests = [
            DrawRequest(0, 0, tuple(int(p) for p in positions[start : start + job.batch_size]))
            for start in range(0, len(positions), job.batch_size)
        ]
        num_processes = self._coordinator.num_processes
        own = requests[self._coordinator.rank :: num_processes]
        batches = drawing_loader(drawn, own, num_workers=job.workers)

        def run_next() -> TeacherArrays | None:
            batch = next(batches, None)
            if batch is None or not batch.keys:  # no more, or every image was corrupt
                return None
            output = run_teacher(job.teacher, batch.pixels, job.precision)
            answers.add(output.logits, batch.labels)
            return output

        for _ in range(0, len(requests), num_processes):
            output = self._coordinator.together(run_next)
            features = output.features if output else {}
            sizes = self._coordinator.collect(len(features[3]) if output else 0)
            received = [
                pair
                for source, size in enumerate(sizes)
                if size
                for pair in self._exchange(features, source)
            ]
            self._coordinator.together(partial(self._keep, received))
            self._num_batches += sum(size > 0 for size in sizes)
            self.num_views += sum(sizes)
            progress.advance(sum(sizes))

    def blocks(self, stage: int) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the batches of a stage that this process receives, in order."""
        if not self._num_batches:
            return  # every image was corrupt
        with self._file(stage).open("rb") as file:
            for _ in range(self._num_batches):
                yield np.load(file)

    def _exchange(
        self, features: dict[int, np.ndarray[Any, Any]], source: int
    ) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """Send the batch of one process to those that need it; yield what this one receives."""
        prefix = features[3][:, : self._num_prefix_tokens] if features else None
        entering = self._coordinator.transfer(prefix, source, _MAIN)
        if entering is not None:
            self.entering.append(torch.from_numpy(entering.copy()))
        for stage, owner in self._owners.items():
            values = self._coordinator.transfer(features.get(stage), source, owner)
            if values is not None:
                yield stage, values

    def _keep(self, received: list[tuple[int, np.ndarray[Any, Any]]]) -> None:
        for stage, values in received:
            with self._file(stage).open("ab") as file:
                np.save(file, values)

    def _file(self, stage: int) -> Path:
        return self._folder / f"stage{stage}"


def owners_of(stages: Sequence[int], num_processes: int) -> dict[int, int]:
    """Return the process that fits the codec of each stage: each another one, if there are enough.

    Args:
        stages: Stages that are kept.
        num_processes: Number of processes.
    """
    return {stage: index % num_processes for index, stage in enumerate(stages)}
