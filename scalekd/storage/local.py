"""Storage in a folder of this machine or of a shared file system."""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from scalekd.storage.base import NotStored, Storage, StoredFile, StoredFileError
from scalekd.storage.files import TEMPORARY_SUFFIX, commit_file, explained, inside

_PIECE_BYTES = 1 << 20


class LocalStorage(Storage):
    """Files below a folder; symbolic links below it are not followed.

    Attributes:
        root: Path of the folder.
    """

    root: Path
    is_remote = False

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.location = str(self.root)

    def locate(self, relative: str) -> str:
        return str(self.root / relative)

    def below(self, folder: str) -> "LocalStorage":
        return LocalStorage(self.path(folder))

    def path(self, relative: str) -> Path:
        """Return the path of a file; refuse one that leads out of the folder."""
        return inside(self.root, relative)

    def read(self, relative: str, *, max_bytes: int, sha256: str | None = None) -> bytes:
        del sha256
        path = self.path(relative)
        size = self._status(path).st_size
        if size > max_bytes:
            raise StoredFileError.too_large(str(path), size, max_bytes)
        with explained(path, "cannot read"):
            return path.read_bytes()

    def read_range(
        self, relative: str, start: int, length: int, *, version: str | None = None
    ) -> bytes:
        del version
        path = self.path(relative)
        size = self._status(path).st_size
        if start + length > size:
            raise StoredFileError.too_short(str(path), size, start, length)
        with explained(path, "cannot read"), path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise StoredFileError(str(path), "changed while it was read")
        return data

    def stream(self, relative: str) -> Iterator[bytes]:
        path = self.path(relative)
        self._status(path)
        with explained(path, "cannot read"), path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    def open(self, relative: str, *, version: str | None = None) -> BinaryIO:
        del version
        path = self.path(relative)
        self._status(path)
        with explained(path, "cannot read"):
            return path.open("rb")

    def describe(self, relative: str) -> StoredFile | None:
        try:
            return described(relative, self._status(self.path(relative)))
        except StoredFileError:
            return None

    def exists(self, relative: str) -> bool:
        return self.path(relative).exists()

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        top = self.path(prefix) if prefix else self.root
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode) and not name.endswith(TEMPORARY_SUFFIX):
                        relative = path.relative_to(self.root).as_posix()
                        yield described(relative, status)

    def folders(self, prefix: str = "") -> Sequence[str]:
        top = self.path(prefix) if prefix else self.root
        if not top.is_dir():
            return []
        with explained(top, "cannot read"):
            return sorted(
                entry.name for entry in os.scandir(top) if entry.is_dir(follow_symlinks=False)
            )

    def commit(self, relative: str, data: bytes | memoryview, *, exclusive: bool = False) -> bool:
        return commit_file(self.path(relative), data, exclusive=exclusive)

    def delete(self, relative: str) -> None:
        path = self.path(relative)
        with explained(path, "cannot remove"):
            path.unlink(missing_ok=True)

    @staticmethod
    def _status(path: Path) -> os.stat_result:
        with explained(path, "cannot read"):
            try:
                status = path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                raise NotStored(str(path), "is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise StoredFileError(str(path), "is not a plain file")
        return status


def described(relative: str, status: os.stat_result) -> StoredFile:
    """Return the listing entry of a file from its status."""
    version = f"{status.st_size}-{status.st_mtime_ns}"
    return StoredFile(relative, status.st_size, status.st_mtime, version)
