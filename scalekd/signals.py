"""Stopping by SIGINT and SIGTERM: at once through ``with`` blocks, or after the current update."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Terminated(BaseException):
    """SIGTERM was received. Like ``KeyboardInterrupt``, it is no ``Exception``."""


@contextmanager
def handled(handler: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Call ``handler`` when one of the signals arrives inside the block.

    Python allows signal handlers in the main thread only; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def call(number: int, frame: FrameType | None) -> None:
        del frame
        handler(number)

    previous = {number: signal.signal(number, call) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind the block, as SIGINT does, instead of ending the process at once."""

    def stop(number: int) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the clearing
        raise Terminated

    with handled(stop, signal.SIGTERM):
        yield


class StopRequest:
    """A record of the first SIGTERM or SIGINT; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    def _remember(self, number: int) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Record the signals that arrive inside the block."""
        with handled(self._remember, signal.SIGTERM, signal.SIGINT):
            yield self
