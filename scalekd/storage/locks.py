"""Locks of files and folders between processes; they need a POSIX system."""

from scalekd.errors import EnvironmentFault

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def require_locks() -> None:
    """Raise ``EnvironmentFault`` if this system has no file locks."""
    if fcntl is None:
        raise EnvironmentFault(
            "this command needs POSIX file locks, which Windows does not have; use Linux, macOS or"
            " WSL"
        )


def lock(descriptor: int) -> None:
    """Take the exclusive lock of an open file or folder; wait until it is free.

    Raises:
        EnvironmentFault: The system has no file locks.
        OSError: The file system has no file locks.
    """
    require_locks()
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def lock_record(descriptor: int) -> None:
    """Take the exclusive record lock of an open file, which child processes do not hold.

    Raises:
        EnvironmentFault: The system has no file locks.
        OSError: Another process holds the lock.
    """
    require_locks()
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
