"""Progress display: one updated line on a terminal, plain lines elsewhere.

Everything goes to standard error; standard output belongs to results.
"""

import sys
import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from scalekd.text import format_time_left, printable

_PLAIN_SECONDS = 30.0  # between plain lines of one epoch: a night's log stays readable


class TrainingProgress:
    """Shows epochs, rates, the share of time spent waiting for data, and the time left."""

    def __init__(self, *, num_epochs: int, updates_per_epoch: int, shown: bool) -> None:
        self._num_epochs = num_epochs
        self._updates_per_epoch = updates_per_epoch
        self._shown = shown
        self._console = Console(stderr=True)
        self._last_plain = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            transient=True,
            disable=not (shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("training", total=num_epochs * updates_per_epoch, facts="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        if self._shown:
            self._console.print(printable(text), highlight=False, soft_wrap=True, markup=False)

    def step(self, epoch: int, num_updates: int, values: Mapping[str, float]) -> None:
        """Show one update's figures, as ``log.jsonl`` has them."""
        facts = (
            f"loss {values['loss']:.4g}  {values['samples_viewed']:,.0f} views  "
            f"{values['images_per_second']:.0f} images/s  "
            f"{values['data_wait_share']:.0%} waiting for data"
        )
        if (left := self._time_left(num_updates)) is not None:
            facts += f"  {left}"
        where = f"epoch {epoch + 1}/{self._num_epochs}"
        if not self._bar.disable:
            self._bar.update(self._task, completed=num_updates, description=where, facts=facts)
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            done = num_updates % self._updates_per_epoch or self._updates_per_epoch
            self.say(f"{where}  step {done}/{self._updates_per_epoch}  {facts}")

    def _time_left(self, num_updates: int) -> str | None:
        """Estimate the time left from the updates of this process; ``None`` at its first one."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, num_updates
        started, first = self._first
        if num_updates == first:
            return None
        seconds_per_update = (now - started) / (num_updates - first)
        remaining = self._num_epochs * self._updates_per_epoch - num_updates
        return format_time_left(max(0, remaining) * seconds_per_update)
