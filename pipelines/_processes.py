"""The processes of one command: what one of them does alone, and what they do together."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState

from scalekd.distributed import Coordinator
from scalekd.pipelines._notes import note

T = TypeVar("T")


class Processes:
    """The processes that ``torchrun`` or ``accelerate launch`` started for a command, or one.

    Every method but :meth:`note` must be called by all processes, in the same order.

    Attributes:
        index: Number of this process.
        count: Number of processes.
        is_main: Whether this process prints, and writes what is written once.
        device: Device of this process.
        coordinator: Collective operations of the processes.
    """

    def __init__(self) -> None:
        # Accelerate starts gloo for processes on CPUs only when told that CPUs are meant.
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.index, self.count = state.process_index, state.num_processes
        self.is_main: bool = state.is_main_process
        self.device = state.device
        self.coordinator = Coordinator(state.num_processes)

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work`` in every process; where one fails, all raise."""
        return self.coordinator.together(work)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do ``work`` in the main process alone; all go on together, or fail together.

        Returns:
            Its result in the main process, ``None`` in the others.
        """
        return self.together(lambda: work() if self.is_main else None)

    def collect(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks."""
        return self.coordinator.collect(value)

    def note(self, line: str | None) -> None:
        """Print a note once, unless there is nothing to say."""
        if line and self.is_main:
            note(line)
