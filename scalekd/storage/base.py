"""The interface of all storages: a folder, a bucket or a web server.

Files are named by POSIX paths relative to the *location* that was opened. A read returns all the
requested bytes or raises an error. During a commit, readers get either the whole previous content
or the whole new one. A storage does not interpret files: callers check digests.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from scalekd.errors import CacheCorrupt, DataError


class StoredFileError(DataError):
    """A file cannot be read: it is missing, too large, or not a plain file.

    Attributes:
        where: Path or URL of the file.
        problem: What is wrong with the file, as a predicate without its path: ``is missing``.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where} {problem}")
        self.where = where
        self.problem = problem

    @classmethod
    def too_large(cls, where: str, size: int, max_bytes: int) -> "StoredFileError":
        """Return the error of a file with more bytes than the caller accepts."""
        return cls(where, f"has {size:,} bytes, more than the {max_bytes:,} allowed")

    @classmethod
    def too_short(cls, where: str, end: int, start: int, length: int) -> "StoredFileError":
        """Return the error of a file that ends at byte ``end``, before the requested range does."""
        return cls(where, f"ends at byte {end:,}, and {start:,} to {start + length:,} are needed")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.where, self.problem)


class NotStored(StoredFileError):
    """The file does not exist."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing.

    Attributes:
        path: Path relative to the location of the storage.
        size: Size of the file in bytes.
        modified: Time of the last change in seconds since 1970, by the clock of the store.
        version: Text that changes whenever the content does: the store's own tag, or size and time.
    """

    path: str
    size: int
    modified: float
    version: str


@dataclass(frozen=True)
class Listing:
    """All files below a folder, and the entries that cannot be read as files.

    Attributes:
        files: The files, in no particular order.
        skipped: Reason and relative path of each entry that was skipped, such as a broken link.
    """

    files: Sequence[StoredFile]
    skipped: Sequence[tuple[str, str]] = ()


def check_relative(location: str, relative: str) -> str:
    """Return a relative path in normal form; refuse one that could lead out of the location.

    Args:
        location: Folder or URL that the path is relative to, for the message.
        relative: The path to check.

    Raises:
        CacheCorrupt: The path is absolute, empty, or contains ``..``, a backslash or a NUL.
    """
    parts = PurePosixPath(relative)
    is_unsafe = ".." in parts.parts or "\\" in relative or "\0" in relative
    if parts.is_absolute() or not parts.parts or is_unsafe:
        raise CacheCorrupt(f"{location}: {relative!r} is not a path inside the cache")
    return str(parts)


class Storage(ABC):
    """Files below one location. Safe to pickle, and to use from several threads.

    Attributes:
        location: Folder or URL that was opened, without credentials, for messages.
        root: Local folder of the files; ``None`` for a remote storage.
        is_remote: Whether files are read over a network.
        commits_together: Whether :meth:`commit_all` is much cheaper than writing files one by one.
        is_repository: Whether the location is a Hub repository, which shows a README.md and accepts
            a limited number of files.
    """

    location: str
    root: Path | None = None
    is_remote: bool = True
    commits_together: bool = False
    is_repository: bool = False

    def locate(self, relative: str) -> str:
        """Return the full path or URL of a file, for messages."""
        return f"{self.location}/{relative}"

    @abstractmethod
    def below(self, folder: str) -> "Storage":
        """Return a storage of the same kind for the files below a folder of this one."""

    @abstractmethod
    def read(self, relative: str, *, max_bytes: int, sha256: str | None = None) -> bytes:
        """Read the whole content of a file, after checking its size.

        Args:
            relative: Path relative to the location of the storage.
            max_bytes: Largest size accepted.
            sha256: Expected hash of the content, if known. A local cache keeps its copy under this
                name; the hash is not checked here.

        Raises:
            NotStored: The file does not exist.
            StoredFileError: The file is not a plain file, or is larger than ``max_bytes``.
            CacheCorrupt: ``relative`` leads out of the location.
            EnvironmentFault: The store cannot be reached or refuses the credentials.
        """

    @abstractmethod
    def read_range(
        self, relative: str, start: int, length: int, *, version: str | None = None
    ) -> bytes:
        """Read exactly ``length`` bytes from offset ``start`` on.

        Args:
            relative: Path relative to the location of the storage.
            start: Offset of the first byte.
            length: Number of bytes.
            version: Version of the file (:attr:`StoredFile.version`), if known. A local cache then
                fetches the whole file once and reads parts from its copy.

        Raises:
            StoredFileError: The file is missing or ends before ``start + length``; other errors
                are those of :meth:`read`.
        """

    @abstractmethod
    def stream(self, relative: str) -> Iterator[bytes]:
        """Yield the whole content in pieces of a few megabytes, so that memory use is bounded.

        Raises:
            StoredFileError: The file is missing, or ended before its announced size.
        """

    def open(self, relative: str, *, version: str | None = None) -> BinaryIO:
        """Open a file for reading from its start; the returned stream may not be seekable.

        Args:
            relative: Path relative to the location of the storage.
            version: Version of the file, if known; see :meth:`read_range`.
        """
        del version
        return io.BufferedReader(_Pieces(self.stream(relative)), io.DEFAULT_BUFFER_SIZE)

    @abstractmethod
    def describe(self, relative: str) -> StoredFile | None:
        """Return size, time and version of a file, or ``None`` if it does not exist."""

    def size(self, relative: str) -> int | None:
        """Return the size of a file in bytes, or ``None`` if it does not exist."""
        file = self.describe(relative)
        return None if file is None else file.size

    def exists(self, relative: str) -> bool:
        """Return whether a file exists."""
        return self.size(relative) is not None

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        """Yield all files below the folder ``prefix``, at any depth; a missing folder has no files.

        A listing may not yet show files that were written or deleted a moment ago.

        Raises:
            UsageError: The store cannot list (a web server).
        """

    def listing(self, prefix: str = "") -> Listing:
        """List all files below the folder ``prefix``, with the entries that were skipped.

        Raises:
            UsageError: The store cannot list (a web server).
        """
        return Listing(tuple(self.list(prefix)))

    def files(self, prefix: str = "") -> Sequence[StoredFile]:
        """Return the files directly below the folder ``prefix``, sorted by path.

        Raises:
            UsageError: The store cannot list (a web server).
        """
        depth = prefix.count("/") + 2 if prefix else 1
        files = (file for file in self.list(prefix) if file.path.count("/") + 1 == depth)
        return sorted(files, key=lambda file: file.path)

    @abstractmethod
    def folders(self, prefix: str = "") -> Sequence[str]:
        """Return the names of the folders directly below the folder ``prefix``, sorted.

        Raises:
            UsageError: The store cannot list (a web server).
        """

    @abstractmethod
    def commit(self, relative: str, data: bytes | memoryview, *, exclusive: bool = False) -> bool:
        """Write a file so that readers see all of ``data`` or the whole previous content.

        Args:
            relative: Path relative to the location of the storage.
            data: The whole content.
            exclusive: Leave an existing file unchanged.

        Returns:
            Whether this call wrote the file; always true unless ``exclusive``.

        Raises:
            UsageError: The store is read-only.
            EnvironmentFault: The disk is full, permission is denied, or the store is unreachable.
        """

    def commit_all(self, files: Mapping[str, bytes], *, exclusive: bool = False) -> set[str]:
        """Write several files in order, in one commit if the store supports it; see :meth:`commit`.

        Returns:
            Paths of the files that this call wrote.
        """
        return {
            path for path, data in files.items() if self.commit(path, data, exclusive=exclusive)
        }

    @abstractmethod
    def delete(self, relative: str) -> None:
        """Delete a file; a missing file is not an error."""

    def forget(
        self, relative: str, *, sha256: str | None = None, version: str | None = None
    ) -> bool:
        """Drop the local copies of a file whose content turned out to be damaged.

        Args:
            relative: Path relative to the location of the storage.
            sha256: Hash under which a copy was kept, if it was read with one.
            version: Version under which a copy was kept, if it was read with one.

        Returns:
            Whether reading the file again may return another content.
        """
        del relative, sha256, version
        return self.is_remote


class _Pieces(io.RawIOBase):
    """A raw stream over an iterator of byte pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
