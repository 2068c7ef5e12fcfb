"""Agreement between processes: one that fails or is told to stop takes the others with it.

Without this, a process that raises while reading a batch leaves the others waiting in the
next gradient exchange until something kills them. The words exchanged are a few bytes on
the CPU, over gloo even where gradients travel by NCCL, so no accelerator is made to wait.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from scalekd.errors import EnvironmentFault, ScaleKDError

T = TypeVar("T")
# Processes that are done wait for the slowest, and for the one that calibrates: torch's half hour
# would end jobs of hours.
_LONGEST_WAIT = timedelta(days=1)


class TrainingDiverged(ScaleKDError):
    """A loss or gradient stopped being finite; nothing was updated with it."""


class TrainingInterrupted(ScaleKDError):
    """A signal asked the run to stop, and it wrote a checkpoint; exits with 128 + the signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def process_faults() -> Iterator[None]:
    """Say in one line that another process of the run ended while this one exchanged data with it.

    Raises:
        EnvironmentFault: The connection to another process is lost.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and "gloo" not in text.lower():
            raise
        raise EnvironmentFault(
            "another process of the run was killed or lost its connection, and this one stops; see "
            f"its output for the reason, then run the same command again ({text[:200]})"
        ) from error


class Coordinator:
    """Collective agreement of the processes of a run; alone, every question answers itself.

    Every method must be called by all processes, in the same order.
    """

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self._group: dist.ProcessGroup | None = None
        if num_processes > 1:
            group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
            self._group = group  # type: ignore[assignment]

    @property
    def is_alone(self) -> bool:
        """Whether there is one process."""
        return self._group is None

    def maximum(self, value: int) -> int:
        """The largest of the processes' values."""
        if self._group is None:
            return value
        shared = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return int(shared)

    def collect(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks."""
        if self._group is None:
            return [value]
        values: list[T | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work`` in every process; where one fails, all raise, before anything is exchanged.

        Raises:
            ScaleKDError: This process's own error, or, where only others failed, the first of
                theirs with its exit code.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self._group is None:
                raise
            failure = error
        if self.maximum(failure is not None):
            reports = self.collect(
                None
                if failure is None
                else (getattr(failure, "exit_code", 1), f"{type(failure).__name__}: {failure}")
            )
            if failure is not None:
                raise failure
            rank, report = next((r, x) for r, x in enumerate(reports) if x is not None)
            relayed = ScaleKDError(f"process {rank} failed: {report[1]}")
            relayed.exit_code = report[0]
            raise relayed
        return result  # type: ignore[return-value]


class StopRequest:
    """Remembers the first SIGTERM or SIGINT; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    def _remember(self, signal_number: int, frame: FrameType | None) -> None:
        if self.signal_number and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or signal_number

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catch the signals inside the block; outside the main thread Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {
            number: signal.signal(number, self._remember)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
