"""Progress of long commands: a live bar on a terminal, a line every ten seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
)

from scalekd.pipelines._notes import is_main_process
from scalekd.text import format_duration, format_time_left, printable

_PLAIN_SECONDS = 10.0


class Step:
    """A step of a command that :func:`doing` reports.

    Attributes:
        result: Text about the outcome, for the last line; set inside the block.
    """

    def __init__(self) -> None:
        self.result = "done"


@contextmanager
def doing(what: str, *, enabled: bool | None = None) -> Iterator[Step]:
    """Show what a command does inside the block, such as ``loading the teacher``.

    A terminal shows it at once, until it is done. Elsewhere a step that takes more than ten seconds
    prints a line when it is that old, and another one when it ends.

    Args:
        what: Name of the step.
        enabled: Whether this process prints; the main one of several if ``None``.
    """
    text, step, started = printable(what), Step(), time.monotonic()
    if not (is_main_process() if enabled is None else enabled):
        yield step
        return
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(escape(f"{text} …")):
            yield step
        return
    announced = threading.Event()

    def announce() -> None:
        announced.set()
        print(f"{text} …", file=sys.stderr, flush=True)

    timer = threading.Timer(max(0.0, _PLAIN_SECONDS), announce)
    timer.daemon = True
    timer.start()
    try:
        yield step
    finally:
        timer.cancel()
        timer.join()
    if announced.is_set():
        took = format_duration(time.monotonic() - started)
        print(f"{text}: {printable(step.result)}, {took}", file=sys.stderr, flush=True)


class ProgressReport:
    """Reports the number of units done, their rate, the share of time spent waiting, and time left.

    Args:
        what: Name of the work, at the start of each line.
        total: Number of units to do.
        unit: Plural of the unit, such as ``views``.
        enabled: Whether this process prints; of several processes, one does.
        aside: Returns text to print after the rate; the share of time spent waiting if ``None``.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "views",
        *,
        enabled: bool = True,
        aside: Callable[[], str] | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.enabled = printable(what), total, unit, enabled
        self._aside = aside or (lambda: f"data wait {self.data_wait_share:.0%}")
        self.done = 0
        self.waited_seconds = 0.0
        self._started = self._spoken = time.monotonic()
        console = Console(stderr=True)
        self._live: Progress | None = None
        if enabled and console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}, {task.fields[left]}"),
                console=console,
            )
            self._task = self._live.add_task(self.what, total=total, rate="", left="")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.done / max(self.seconds, 1e-9)

    @property
    def data_wait_share(self) -> float:
        """Share of the time that was spent waiting for data."""
        return self.waited_seconds / max(self.seconds, 1e-9)

    def advance(self, count: int) -> None:
        """Count units as done, and print a line when one is due."""
        self.done += count
        self.total = max(self.total, self.done)  # shards of other processes may be taken over
        if not self.enabled:
            return
        rate = f"{self.rate:,.{0 if self.rate >= 10 else 1}f} {self.unit}/s, {self._aside()}"
        left = format_time_left((self.total - self.done) / max(self.rate, 1e-9))
        if self._live:
            self._live.update(
                self._task, completed=self.done, total=self.total, rate=rate, left=left
            )
        elif time.monotonic() - self._spoken > _PLAIN_SECONDS:
            self._spoken = time.monotonic()
            tally = f"{self.done:,} of {self.total:,} {self.unit}"
            print(f"{self.what}: {tally}, {rate}, {left}", file=sys.stderr, flush=True)
