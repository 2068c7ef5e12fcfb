"""Limit the views between teacher and disk, and relay the first error of the threads there."""

import threading


class InFlight:
    """Limits the views whose features or planes are in memory, and relays errors of threads.

    The thread that runs the teacher calls :meth:`enter`, which waits while there are too many.
    Other threads call :meth:`leave` when views are on disk, or :meth:`fail` with an error, which
    :meth:`enter` then raises.

    Args:
        most: Largest number of views in memory. More are admitted only if there are no others.
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
        """Report an error; only the first is kept."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
