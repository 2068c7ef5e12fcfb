"""Errors that are reported to the user, each with the name and exit code that scripts rely on.

A message says where the fault is, what was found, what was expected, and what to do; the command
line prints it after the error's name, as one line, and exits with ``exit_code``. ``docs/errors.md``
has a section for each name.
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


INTERNAL_ERROR = "InternalError"
"""Name of any exception that is not one of this module; it is reported with its traceback."""


class ScaleKDError(Exception):
    """Base class of errors that are reported as one line instead of a traceback.

    Attributes:
        name: Name in the message, in the JSON of a failed command and in ``docs/errors.md``. It
            stays the same when the class is renamed; subclasses without one share their base's.
        exit_code: Exit code of a command that ends with the error.
    """

    name = INTERNAL_ERROR
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

    name = "UsageError"
    exit_code = 2


class DataError(ScaleKDError):
    """The input data is invalid: missing or empty folder, corrupt image, other data set."""

    name = "DataError"
    exit_code = 3


class CacheError(ScaleKDError):
    """The cache cannot be used for this command."""

    name = "CacheError"
    exit_code = 4


class CacheCorrupt(CacheError):
    """Bytes in the cache are missing, unexpected, or differ from those that were committed."""

    name = "CacheCorrupt"


class CacheMismatch(CacheError):
    """The cache is valid but belongs to another teacher, data set, view or format version."""

    name = "CacheMismatch"


class EnvironmentFault(ScaleKDError):
    """The machine cannot do it: disk full, no permission, a missing package or weights file."""

    name = "EnvironmentFault"
    exit_code = 5


class TrainingInterrupted(ScaleKDError):
    """The command received a signal, Ctrl-C or SIGTERM, and stopped with its work saved.

    Args:
        message: What was kept and how to continue.
        signal_number: The signal; the exit code is 128 + its number.
    """

    name = "Interrupted"

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.signal_number)


class TrainingDiverged(ScaleKDError):
    """A loss or gradient is not finite; the weights were not updated with it."""

    name = "TrainingDiverged"
