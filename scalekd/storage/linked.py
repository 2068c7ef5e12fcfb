"""Folders in which symbolic links are followed, for folders of images."""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from scalekd.errors import DataError, EnvironmentFault, advice_on
from scalekd.storage.base import Listing, NotStored, StoredFile, StoredFileError
from scalekd.storage.local import LocalStorage, described

_MAX_LINKED_FOLDERS = 1 << 16  # in one listing: links can multiply folders without limit


class LinkedStorage(LocalStorage):
    """Files below a folder; symbolic links are followed, as in timm and torchvision.

    A link to a folder that contains the link is not followed, so that a listing ends. Paths come
    from :meth:`listing` or from the user, and may lead out of the folder.
    """

    def path(self, relative: str) -> Path:
        """Return the path of a file."""
        return self.root / relative

    def below(self, folder: str) -> "LinkedStorage":
        return LinkedStorage(self.path(folder))

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        yield from self.listing(prefix).files

    def listing(self, prefix: str = "") -> Listing:
        """List all files below the folder ``prefix``, and the entries that cannot be read as files.

        Raises:
            EnvironmentFault: A folder cannot be read.
            DataError: Symbolic links lead to more than 65,536 folders.
        """
        with _readable(self.path(prefix)):
            return _walk(self.path(prefix), prefix)

    def files(self, prefix: str = "") -> Sequence[StoredFile]:
        if not self.path(prefix).is_dir():
            return []
        with _readable(self.path(prefix)):
            names = sorted(entry.name for entry in os.scandir(self.path(prefix)))
        paths = [f"{prefix}/{name}" if prefix else name for name in names]
        # A broken link is listed as well: reading it must fail.
        return [
            self.describe(path) or StoredFile(path, 0, 0.0, "missing")
            for path in paths
            if not self.path(path).is_dir()
        ]

    def folders(self, prefix: str = "") -> Sequence[str]:
        top = self.path(prefix)
        if not top.is_dir():
            return []
        with _readable(top):
            return sorted(entry.name for entry in os.scandir(top) if entry.is_dir())

    @staticmethod
    def _status(path: Path) -> os.stat_result:
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise NotStored(str(path), "is missing") from None
        except OSError as error:
            raise StoredFileError(str(path), f"cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode):
            raise StoredFileError(str(path), "is not a plain file")
        return status


def _walk(top: Path, prefix: str) -> Listing:
    files: list[StoredFile] = []
    skipped: list[tuple[str, str]] = []
    num_linked = 0
    # Each entry has a folder, its prefix, and the identities of the folders it was reached through.
    above = frozenset(_identity(folder) for folder in (top, *top.resolve().parents))
    waiting = [(str(top), prefix, above)]
    while waiting:
        folder, relative, above = waiting.pop()
        with _readable(folder):
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            try:
                status = entry.stat()
            except OSError:
                kind = "broken links" if entry.is_symlink() else "unreadable entries"
                skipped.append((kind, path))
                continue
            identity = status.st_dev, status.st_ino
            if stat.S_ISREG(status.st_mode):
                files.append(described(path, status))
            elif not stat.S_ISDIR(status.st_mode):
                skipped.append(("pipes, sockets and devices", path))
            elif identity in above:
                skipped.append(("links to a folder that contains them", path))
            else:
                num_linked += entry.is_symlink()
                if num_linked > _MAX_LINKED_FOLDERS:
                    raise DataError(
                        f"{entry.path}: symbolic links lead to more than {_MAX_LINKED_FOLDERS:,}"
                        " folders; they may contain one another, remove some"
                    )
                waiting.append((entry.path, path, above | {identity}))
    return Listing(files, sorted(skipped, key=lambda entry: entry[1]))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    """Convert errors of listing a folder to an :class:`EnvironmentFault`."""
    try:
        yield
    except OSError as error:
        advice = advice_on(error) or error.strerror
        raise EnvironmentFault(f"cannot list {folder}: {advice}") from error
