"""Work between the teacher and the disk: how much there may be, and the first error in it."""

import threading


class InFlight:
    """Bounds the views whose features or planes are in memory, and relays errors of threads.

    The thread that runs the teacher enters views and waits while there are too many. Other threads
    let them leave once they are on disk, or report what went wrong, which the first thread then
    raises.

    Args:
        most: Views that may be in flight at once. More are let in only when none is.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._changed = threading.Condition()
        self._count = 0
        self._failure: BaseException | None = None

    def enter(self, count: int) -> None:
        """Wait until there is room for ``count`` more views.

        Raises:
            BaseException: The first error that a thread reported.
        """
        with self._changed:
            while self._failure is None and self._count and self._count + count > self.most:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            self._count += count

    def leave(self, count: int) -> None:
        """Report that ``count`` views are on disk."""
        with self._changed:
            self._count -= count
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Report an error; all but the first are dropped."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
