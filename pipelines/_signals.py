"""Stopping a command by SIGTERM: its ``with`` blocks end as they do after Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM was received. Like ``KeyboardInterrupt``, it is no ``Exception``."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind the block, as SIGINT does, instead of ending the process at once.

    Python allows signal handlers in the main thread only; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the clearing
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
