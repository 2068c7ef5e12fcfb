"""A command that is told to stop leaves through its ``with`` blocks, and says with which signal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM came; like Ctrl-C it is nobody's error to catch."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind the block, as SIGINT does, instead of ending the process where it is.

    Outside the main thread Python allows no handlers, and the block runs as it would without.
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
