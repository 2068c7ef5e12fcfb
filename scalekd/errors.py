"""Errors that are reported to the user, each with the exit code that scripts rely on.

A message says where the fault is, what was found, what was expected, and what to do; the command
line prints it as one line and exits with ``exit_code``.
"""

import contextlib
import errno
from collections.abc import Iterator, Mapping

from scalekd.text import one_line

_ADVICE = {
    errno.ENOSPC: "the disk is full: free space and run the same command again",
    errno.EDQUOT: "the quota is used up: raise it and run the same command again",
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.EACCES: "permission denied: choose another folder or ask its owner",
    errno.EPERM: "permission denied: choose another folder or ask its owner",
    errno.EMFILE: "too many open files: raise `ulimit -n` and run the same command again",
    errno.ENFILE: "too many open files on this machine: run the same command again later",
    errno.ENOTDIR: "there is a file where a folder is needed",
    errno.EEXIST: "there is a file where a folder is needed",
    errno.EIO: "the device failed: check it, then run the same command again",
}


def advice_on(error: OSError) -> str | None:
    """Return what to do about an error of the operating system; ``None`` for an unknown error."""
    return _ADVICE.get(error.errno or 0)


class ScaleKDError(Exception):
    """Base class of errors that are reported as one line instead of a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())  # the text may come from a document or a server


@contextlib.contextmanager
def rewording(changes: Mapping[str, str]) -> Iterator[None]:
    """Replace parts of the messages of errors, such as advice that names another command's options.

    Args:
        changes: Replacement of each part of a message.
    """
    try:
        yield
    except ScaleKDError as error:
        message = reworded = str(error)
        for part, instead in changes.items():
            reworded = reworded.replace(part, instead)
        if reworded == message:
            raise
        raise type(error)(reworded) from error


class UsageError(ScaleKDError):
    """The command or call is invalid: unknown model, impossible option."""

    exit_code = 2


class DataError(ScaleKDError):
    """The input data is invalid: missing or empty folder, corrupt image, other data set."""

    exit_code = 3


class CacheError(ScaleKDError):
    """The cache cannot be used for this command."""

    exit_code = 4


class CacheCorrupt(CacheError):
    """Bytes in the cache are missing, unexpected, or differ from those that were committed."""


class CacheMismatch(CacheError):
    """The cache is valid but belongs to another teacher, data set, view or format version."""


class EnvironmentFault(ScaleKDError):
    """The machine cannot do it: disk full, no permission, a missing package or weights file."""

    exit_code = 5
