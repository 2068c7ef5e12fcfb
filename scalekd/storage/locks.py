"""Locks of files and folders between processes, which need a POSIX system."""

from scalekd.errors import EnvironmentFault

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def require_locks() -> None:
    """Check that this system has file locks, before other work.

    Raises:
        EnvironmentFault: It has none.
    """
    if fcntl is None:
        raise EnvironmentFault(
            "this command agrees with other processes by POSIX file locks, which Windows does not"
            " have; use Linux, macOS or WSL"
        )


def lock(descriptor: int) -> None:
    """Take the exclusive lock of an open file or folder; wait until it is free.

    Raises:
        EnvironmentFault: The system has no such locks.
        OSError: The file system has none.
    """
    require_locks()
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def lock_record(descriptor: int) -> None:
    """Take the exclusive record lock of an open file, which child processes do not hold.

    Raises:
        EnvironmentFault: The system has no such locks.
        OSError: Another process holds the lock.
    """
    require_locks()
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
