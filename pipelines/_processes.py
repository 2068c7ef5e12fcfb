"""Coordinate the processes of one command."""

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
        is_main: Whether this is the main process, which prints and writes documents.
        device: Device of this process.
        coordinator: Collective operations of the processes.
    """

    def __init__(self) -> None:
        # Without cpu=True, Accelerate does not start gloo for processes on CPUs.
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.index, self.count = state.process_index, state.num_processes
        self.is_main: bool = state.is_main_process
        self.device = state.device
        self.coordinator = Coordinator(state.num_processes)

    def together(self, work: Callable[[], T]) -> T:
        """Call ``work`` in every process; if one fails, all raise."""
        return self.coordinator.together(work)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Call ``work`` in the main process alone; if it fails, all processes raise.

        Returns:
            The result in the main process, ``None`` in the others.
        """
        return self.together(lambda: work() if self.is_main else None)

    def collect(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        return self.coordinator.collect(value)

    def note(self, *lines: str) -> None:
        """Print notes in the main process; empty ones are left out."""
        note(*filter(None, lines if self.is_main else ()))
