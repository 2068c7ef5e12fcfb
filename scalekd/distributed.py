"""Agreement between the processes of a run: if one fails or receives a signal, all of them stop.

Without this, a process that raises while reading a batch leaves the others waiting in the next
gradient exchange until they are killed. Processes exchange a few bytes on the CPU, over gloo even
if gradients are exchanged by NCCL, so that no accelerator waits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from scalekd.errors import INTERNAL_ERROR, EnvironmentFault, ScaleKDError

T = TypeVar("T")
_MOST_AXES = 7
# Processes wait for the slowest one, and for those that fit codecs; torch's default of 30 minutes
# would end long jobs.
_LONGEST_WAIT = timedelta(days=1)


@contextmanager
def process_faults() -> Iterator[None]:
    """Report in one line that the connection to another process of the run was lost.

    Raises:
        EnvironmentFault: The connection to another process was lost.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no exception class
        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and "gloo" not in text.lower():
            raise
        raise EnvironmentFault(
            "another process of the run was killed or lost its connection, and this one stops; see "
            f"its output for the reason, then run the same command again ({text[:200]})"
        ) from error


class Coordinator:
    """Collective operations of the processes of a run.

    Every method must be called by all processes, in the same order. With one process nothing is
    exchanged.
    """

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self._group: dist.ProcessGroup | None = None
        if num_processes > 1:
            group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
            self._group = group  # type: ignore[assignment]

    @property
    def is_alone(self) -> bool:
        """Whether the run has only one process."""
        return self._group is None

    @property
    def rank(self) -> int:
        """Number of this process; 0 for the main one."""
        return 0 if self._group is None else dist.get_rank(self._group)

    def maximum(self, value: int) -> int:
        """Return the largest of the processes' values."""
        if self._group is None:
            return value
        shared = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return int(shared)

    def collect(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        if self._group is None:
            return [value]
        values: list[T | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def transfer(
        self, array: np.ndarray[Any, Any] | None, source: int, target: int
    ) -> np.ndarray[Any, Any] | None:
        """Return in ``target`` the float32 array that ``source`` gives; ``None`` elsewhere.

        The other processes need not call this, and pass anything.
        """
        if source == target:
            return array if self.rank == source else None
        if self.rank == source and array is not None:
            shape = torch.zeros(1 + _MOST_AXES, dtype=torch.int64)
            shape[: 1 + array.ndim] = torch.tensor([array.ndim, *array.shape])
            dist.send(shape, target, self._group)
            dist.send(torch.from_numpy(np.ascontiguousarray(array)), target, self._group)
        elif self.rank == target:
            shape = torch.zeros(1 + _MOST_AXES, dtype=torch.int64)
            dist.recv(shape, source, self._group)
            num_axes, *sides = shape.tolist()
            received = torch.empty(sides[:num_axes], dtype=torch.float32)
            dist.recv(received, source, self._group)
            return received.numpy()
        return None

    def together(self, work: Callable[[], T]) -> T:
        """Call ``work`` in every process; if it fails in one, all raise an error.

        Raises:
            ScaleKDError: The error of this process, or, if only others failed, the first of their
                errors with its exit code.
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
                else (
                    getattr(failure, "exit_code", 1),
                    getattr(failure, "name", INTERNAL_ERROR),
                    f"{type(failure).__name__}: {failure}",
                )
            )
            if failure is not None:
                raise failure
            rank, report = next((r, x) for r, x in enumerate(reports) if x is not None)
            remote = ScaleKDError(f"process {rank} failed: {report[2]}")
            remote.exit_code, remote.name = report[:2]
            raise remote
        return result  # type: ignore[return-value]
