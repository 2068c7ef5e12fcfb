"""Everything that a run writes: summary, step log, trackers, checkpoints and messages.

Only the main process writes. Methods documented as "called by every process" are collective.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from scalekd.distributed import Coordinator
from scalekd.errors import DataError
from scalekd.training.checkpoint import Checkpoint, Position, write_checkpoint
from scalekd.training.config import TrainConfig
from scalekd.training.interfaces import score_texts
from scalekd.training.progress import TrainingProgress
from scalekd.training.run_folder import RunFolder
from scalekd.training.trackers import Trackers

T = TypeVar("T")


class RunWriter:
    """Writes a run's folder and trackers, and decides which epoch is the best.

    Args:
        config: Configuration of the run.
        accelerator: Accelerator of the run.
        coordinator: Exchanges values between the run's processes.
        measure: Name of the metric that chooses the best epoch and of what it is measured on. A run
            that is continued with another measure does not compare its epochs with earlier ones.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        coordinator: Coordinator,
        measure: str | None = None,
    ) -> None:
        self.folder = RunFolder(Path(config.output))
        self.last_row: dict[str, float] = {}
        self._config = config
        self._is_main = accelerator.is_main_process
        self._coordinator = coordinator
        self._trackers = Trackers(accelerator, Path(config.output))
        self._metric_by_epoch: dict[int, float] = {}
        self._measure = self._measure_so_far = measure
        self._num_epochs = 0
        self._progress: TrainingProgress | None = None

    @contextlib.contextmanager
    def writing(self, *, num_epochs: int, updates_per_epoch: int) -> Iterator[None]:
        """Show progress inside the block; close trackers and release the folder after it."""
        self._num_epochs = num_epochs
        self._progress = TrainingProgress(
            num_epochs=num_epochs, updates_per_epoch=updates_per_epoch, shown=self._is_main
        )
        with (
            self._progress,
            contextlib.closing(self.folder),
            contextlib.closing(self._trackers),
        ):
            yield

    def say(self, line: str) -> None:
        """Show a line on the terminal."""
        if self._progress is not None:
            self._progress.say(line)

    def claim(self) -> tuple[Path | None, list[str]]:
        """Claim the folder for this run; called by every process.

        Returns:
            The checkpoint to continue from, if any, and sentences on what differs from before.
        """
        claimed = self._by_main(lambda: self.folder.claim(self._config))
        # On a shared file system all processes read what the main one has found.
        return self._coordinator.collect(claimed)[0]  # type: ignore[return-value]

    def _by_main(self, work: Callable[[], T]) -> T | None:
        """Let the main process do something that may fail; called by every process."""
        return self._coordinator.together(lambda: work() if self._is_main else None)

    def start(self, position: Position) -> None:
        """Begin at a position: drop what was logged after it, start trackers; by every process.

        Raises:
            DataError: The summary is damaged.
            EnvironmentFault: A tracker cannot be reached or written.
        """

        def begin() -> None:
            self.folder.step_log.keep_until(position.num_updates)
            dropped = self.folder.summary.keep_until(position.epoch)
            if dropped:
                self.say(
                    f"{self.folder.summary.path}: the rows of {dropped} epochs after the checkpoint"
                    " are dropped; these epochs are trained again"
                )
            self._trackers.start(self._config.model_dump(mode="json"))

        self._by_main(begin)

    def log_step(self, record: Mapping[str, float]) -> None:
        """Write a line of the step log."""
        if self._is_main:
            self.folder.step_log.write(record)
        self._trackers.log(record, step=int(record["step"]), say=self.say)
        if self._progress is not None:
            self._progress.step(int(record["epoch"]), int(record["step"]), record)

    def end_epoch(self, row: Mapping[str, float], metric: float | None) -> bool:
        """Write an epoch's row of the summary.

        Before the checkpoint: a crash between the two trains and writes this epoch again.

        Returns:
            Whether it is the best epoch so far.
        """
        best = False
        if metric is not None:
            if self._measure_so_far not in (None, self._measure):
                self._metric_by_epoch.clear()
            self._measure_so_far = self._measure
            best = metric > max(self._metric_by_epoch.values(), default=-math.inf)
            self._metric_by_epoch[int(row["epoch"])] = metric
        self.last_row = dict(row)
        if self._is_main:
            self.folder.summary.write(row)
        return best

    def announce_epoch(self, row: Mapping[str, float], *, step: int) -> None:
        """Show a finished epoch, and hand it to the trackers."""
        self._trackers.log(row, step=step, say=self.say)
        self.say(_epoch_line(row, self._num_epochs))

    def save(self, checkpoint: Checkpoint, *, best: bool, keep_as: int | None) -> None:
        """Write ``last``, and copy it where an epoch is kept; called by every process."""

        def write() -> None:
            write_checkpoint(self.folder.last, checkpoint)
            if keep_as is not None:
                self._keep(keep_as, best=best)

        self._by_main(write)

    def copy_again(self, path: Path, position: Position) -> None:
        """Repeat the copies of ``last`` that a kill just after it was written prevented.

        Called by every process.
        """
        epoch = position.epoch - 1
        if epoch < 0 or position.epoch_samples:
            return

        def copy() -> None:
            last = self.folder.last
            if last.exists() and path.samefile(last):
                self._keep(epoch, best=epoch == self.best_epoch)

        self._by_main(copy)

    def _keep(self, epoch: int, *, best: bool) -> None:
        if best:
            self.folder.keep_best()
        self.folder.keep_epoch(epoch, self._metric_by_epoch, self._config.checkpoint_hist)

    @property
    def best_epoch(self) -> int:
        """The first of the epochs with the best metric; -1 before there is one."""
        metrics = self._metric_by_epoch
        return max(metrics, key=lambda epoch: (metrics[epoch], -epoch), default=-1)

    @property
    def best_metric(self) -> float:
        """Metric of the best epoch; not a number before there is one."""
        return self._metric_by_epoch.get(self.best_epoch, float("nan"))

    def state(self) -> dict[str, Any]:
        """Return the metrics of the epochs so far as plain values, for a checkpoint."""
        return {
            "metric_by_epoch": dict(self._metric_by_epoch),
            "last_row": dict(self.last_row),
            "measure": self._measure_so_far,
        }

    def restore(self, state: Mapping[str, Any], path: Path) -> list[str]:
        """Restore the result of :meth:`state`.

        Returns:
            A message if the epochs so far were measured otherwise.

        Raises:
            DataError: The state is damaged.
        """
        try:
            by_epoch = state["metric_by_epoch"].items()
            self._metric_by_epoch = {int(epoch): float(value) for epoch, value in by_epoch}
            self.last_row = {str(name): float(value) for name, value in state["last_row"].items()}
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: the checkpoint's metrics are damaged: {error!r}") from error
        self._measure_so_far = state.get("measure")  # checkpoints of earlier releases have none
        if self._measure_so_far in (None, self._measure) or not self._metric_by_epoch:
            return []
        return [
            "the epochs so far were validated otherwise, and are not compared with those from here"
            " on: model_best becomes the best of these"
        ]


def _epoch_line(row: Mapping[str, float], num_epochs: int) -> str:
    parts = [f"epoch {int(row['epoch']) + 1}/{num_epochs}", f"loss {row['train_loss']:.4g}"]
    parts += score_texts(row)
    parts.append(f"{row['samples_viewed']:,.0f} views")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    parts.append(f"{row['data_wait_share']:.0%} waiting for data")
    return "  ".join(parts)
