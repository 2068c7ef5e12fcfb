"""Checks between updates: what to log, whether a process failed, and agreement of the processes.

Every ten updates the processes exchange one integer, which tells whether any of them failed or
received a signal. When a line of the log is due, its means are exchanged together with it.
"""

import math
from collections.abc import Mapping

from scalekd.distributed import Coordinator
from scalekd.errors import TrainingDiverged
from scalekd.signals import StopRequest
from scalekd.training.checkpoint import Position, find_checkpoint
from scalekd.training.logs import RunningMeans
from scalekd.training.meter import Interval, Meter
from scalekd.training.module import METRICS
from scalekd.training.run_writer import RunWriter

_AGREE_EVERY = 10  # updates; a signal to one of several processes is obeyed by then
# Above any signal's number. A gradient is a sum over the processes: where that alone is not finite,
# the reason may be another process, whose own failure then counts.
_GRADIENT_FAILED = 1 << 16
_FAILED = 1 << 17


class Lookout:
    """Decides between updates whether a run goes on.

    Args:
        meter: Provides the measurements of the updates.
        coordinator: Exchanges values between the run's processes.
        writer: Receives the lines of the step log.
        stop: Signals to this process.
        scaled: Whether a gradient scaler is in use, which skips a step itself.

    Attributes:
        failure: The first failure of this process that was not yet reported to the others.
    """

    def __init__(
        self,
        meter: Meter,
        coordinator: Coordinator,
        writer: RunWriter,
        stop: StopRequest,
        *,
        scaled: bool,
    ) -> None:
        self.failure: Exception | None = None
        self._meter = meter
        self._coordinator = coordinator
        self._writer = writer
        self._stop = stop
        self._scaled = scaled
        self._recent: list[Interval] = []
        self._only_gradient = False

    def look(self, position: Position, *, everything: bool = False) -> int:
        """Look at the intervals that are due; called by every process after every update.

        Args:
            position: Position of the run.
            everything: Also look at the newest interval, for which the host may have to wait.

        Returns:
            Number of a signal that a process received, or 0.

        Raises:
            ScaleKDError: This process or another one failed.
        """
        for interval in self._meter.take(everything=everything):
            self._recent.append(interval)
            if not self._meter.late:  # every update was checked before its step
                continue
            updates = interval.position.num_updates - len(interval.updates)
            for number, values in enumerate(interval.updates):
                before = Position(interval.position.epoch, num_updates=updates + number)
                self.check(values, before)
        status = self._stop.signal_number
        if self.failure is not None:
            status = _GRADIENT_FAILED if self._only_gradient else _FAILED
        if records := self._records():
            status = self._log(records, status)
        elif self._coordinator.is_alone or everything or position.num_updates % _AGREE_EVERY == 0:
            status = self._coordinator.maximum(status)
        else:
            return 0
        if status >= _FAILED and self._only_gradient:
            self.failure = None
        if status >= _GRADIENT_FAILED:
            self._coordinator.together(self.raise_failure)
        return status

    def check(self, values: Mapping[str, float], position: Position) -> None:
        """Remember an update with a loss or norm that is not finite, if it is the first.

        Args:
            values: Measurements of the update, by name.
            position: Position of the run before it.
        """
        wrong = [name for name in values if not math.isfinite(values[name]) and name not in METRICS]
        if self._scaled:
            wrong = [name for name in wrong if name != "grad_norm"]
        # The sum is not finite because a term is not: the term is what helps.
        terms = [name for name in wrong if name not in ("loss", "grad_norm")] or wrong
        if not terms or self.failure is not None:
            return
        what = "the gradient's norm" if terms[0] == "grad_norm" else terms[0]
        saved = find_checkpoint(self._writer.folder.last)
        kept = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
        self._only_gradient = terms[0] == "grad_norm"
        self.failure = TrainingDiverged(
            f"update {position.num_updates + 1} (epoch {position.epoch + 1}): {what} is "
            f"{values[terms[0]]}; nothing was updated with it. Lower --lr, add --clip-grad or "
            f"warm-up, or train with --amp no; {kept}"
        )

    def fail(self, error: Exception) -> None:
        """Record an error of this process, unless it failed before."""
        if self.failure is None or self._only_gradient:
            self.failure, self._only_gradient = error, False

    def raise_failure(self) -> None:
        """Raise this process's failure, if there is one."""
        if self.failure is not None:
            raise self.failure

    def over_processes(self, means: RunningMeans) -> RunningMeans:
        """Return the means over all processes; called by every process."""
        together = RunningMeans()
        for state in self._coordinator.collect(means.state()):
            together.merge(state)
        return together

    def epoch_row(self, position: Position, lr: float) -> dict[str, float]:
        """Return the measurements of an epoch over all processes; called by every process."""
        means = self.over_processes(self._meter.epoch)
        seconds = means.sums.pop("_seconds", 0.0) / self._coordinator.num_processes
        waited = means.sums.pop("_waited", 0.0) / self._coordinator.num_processes
        row: dict[str, float] = {"epoch": position.epoch}
        row |= {f"train_{name}": value for name, value in means.means().items()}
        return row | {
            "lr": lr,
            "samples_viewed": position.samples_viewed,
            "images_per_second": position.epoch_samples / max(seconds, 1e-9),
            "data_wait_share": waited / max(seconds, 1e-9),
            "seconds": seconds,
        }

    def _log(self, records: list[tuple[dict[str, float], RunningMeans]], status: int) -> int:
        """Exchange the means of records and the status; return the largest status."""
        answers = self._coordinator.collect((status, [means.state() for _, means in records]))
        status = max(answer for answer, _ in answers)
        for number, (record, _) in enumerate(records):
            together = RunningMeans()
            for _, states in answers:
                together.merge(states[number])
            if status < _GRADIENT_FAILED:
                self._writer.log_step({**record, **together.means()})
        return status

    def _records(self) -> list[tuple[dict[str, float], RunningMeans]]:
        """Return a line of the log and its means for each stretch of intervals that is logged."""
        records = []
        while any(interval.logged for interval in self._recent):
            end = next(i for i, interval in enumerate(self._recent) if interval.logged) + 1
            stretch, self._recent = self._recent[:end], self._recent[end:]
            means = RunningMeans()
            for interval in stretch:
                means.merge(interval.means().state())
            seconds = sum(interval.seconds for interval in stretch)
            position = stretch[-1].position
            record = {
                "epoch": position.epoch,
                "step": position.num_updates,
                "samples_viewed": position.samples_viewed,
                "lr": stretch[-1].lr,
                # Every process weighs its means with the views of all.
                "images_per_second": means.weight / seconds,
                "data_wait_share": sum(interval.waited for interval in stretch) / seconds,
            }
            records.append((record, means))
        return records
