"""Measurements of a run: the device's results, read without waiting for it, and the clock.

Losses and the gradient's norm of every update are kept in one small tensor on the device. At the
end of an interval it is copied to the host behind the queued work, and is read one interval later,
when the copy has long arrived: the host never waits for the device. On a CPU there is nothing to
wait for, and an interval is read when it ends.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scalekd.training.checkpoint import Position
from scalekd.training.logs import RunningMeans

_MAX_ROWS = 100
"""Largest number of updates of an interval, after which a run that diverged stops at the latest."""


@dataclass(frozen=True)
class Interval:
    """What some consecutive updates measured, on the host.

    Attributes:
        position: Position of the run after the last of them.
        lr: Learning rate of the last update.
        logged: Whether a line of the step log ends here.
        updates: Measurements of each update, by name.
        views: Views of each update, over all processes.
        seconds: Duration of the interval.
        waited: Seconds of the interval that were spent waiting for data.
    """

    position: Position
    lr: float
    logged: bool
    updates: tuple[dict[str, float], ...]
    views: tuple[int, ...]
    seconds: float
    waited: float

    def means(self) -> RunningMeans:
        """Return the means over the interval's updates, weighted by views."""
        means = RunningMeans()
        for values, num_views in zip(self.updates, self.views, strict=True):
            means.add(values, num_views)
        return means


class Meter:
    """Collects the measurements of updates, and gives them back by intervals.

    Args:
        interval: Updates between lines of the step log.
        late: Give an interval back once the next one ends, not at once.

    Attributes:
        late: Whether an interval is returned only after the next one ends.
        epoch: Means over the epoch so far, of the intervals that were given back.
    """

    def __init__(self, interval: int, *, late: bool) -> None:
        self.epoch = RunningMeans()
        self._interval = interval
        self.late = late
        self._names: tuple[str, ...] = ()
        self._rows: Tensor | None = None
        self._views: list[int] = []
        self._waited = 0.0
        self._started = time.monotonic()
        self._pending: list[tuple[partial[Interval], _Copy]] = []

    def start(self) -> None:
        """Start the clock of the next interval."""
        self._waited, self._started = 0.0, time.monotonic()

    def waiting(self, seconds: float) -> None:
        """Count time that was spent waiting for data."""
        self._waited += seconds

    def add(self, values: Mapping[str, Tensor], num_views: int) -> Tensor:
        """Keep one update's measurements; return them as one tensor, in the mapping's order."""
        row = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if self._rows is None:
            self._names = tuple(values)
            self._rows = row.new_empty((min(self._interval, _MAX_ROWS), len(row)))
        self._rows[len(self._views)].copy_(row)
        self._views.append(num_views)
        return row

    def named(self, row: Tensor) -> dict[str, float]:
        """Return one update's measurements on the host; waits for the device."""
        return dict(zip(self._names, row.tolist(), strict=True))

    @property
    def is_full(self) -> bool:
        """Whether the interval has as many updates as one may have."""
        return self._rows is not None and len(self._views) == len(self._rows)

    def end(self, position: Position, lr: float, *, logged: bool) -> None:
        """End the interval, and queue the copy of its measurements to the host.

        Args:
            position: Position of the run after its last update.
            lr: Learning rate of its last update.
            logged: Whether a line of the step log ends here.
        """
        if self._rows is None or not self._views:
            return
        now = time.monotonic()
        interval = partial(
            Interval,
            position=position,
            lr=lr,
            logged=logged,
            views=tuple(self._views),
            seconds=max(now - self._started, 1e-9),
            waited=self._waited,
        )
        self._pending.append((interval, _Copy(self._rows[: len(self._views)], self._names)))
        self._rows, self._views = None, []
        self._waited, self._started = 0.0, now

    def take(self, *, everything: bool = False) -> list[Interval]:
        """Return the intervals that are due, oldest first, and add them to the means of the epoch.

        Args:
            everything: Include the newest interval, for which the host may have to wait.
        """
        kept = 0 if everything or not self.late else 1
        due = self._pending[: len(self._pending) - kept]
        self._pending = self._pending[len(due) :]
        intervals = [interval(updates=copy.updates()) for interval, copy in due]
        for interval in intervals:
            for values, num_views in zip(interval.updates, interval.views, strict=True):
                self.epoch.add(values, num_views)
            # Rates travel as sums of seconds, so that they average over resumed parts too.
            times = {"_seconds": interval.seconds, "_waited": interval.waited}
            self.epoch.merge({"sums": times, "weight": 0.0})
        return intervals


class _Copy:
    """A copy of measurements on its way to the host, one row an update."""

    def __init__(self, values: Tensor, names: tuple[str, ...]) -> None:
        self._names = names
        on_cuda = values.device.type == "cuda"
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_cuda)
        self._host.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def updates(self) -> tuple[dict[str, float], ...]:
        """Return the measurements by name; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return tuple(dict(zip(self._names, row, strict=True)) for row in self._host.tolist())
