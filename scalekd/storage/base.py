"""What a store of files can do, whatever holds it: a folder, a bucket, a web server.

Names are relative POSIX paths below the *place* that was opened. A read gives the whole of what
was asked for or an error, never less; after a commit readers get the whole content or what was
there before. Nothing here knows what the files mean: callers check digests.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from scalekd.errors import CacheCorrupt, DataError


class StoredFileError(DataError):
    """A file cannot be read as asked: it is missing, too large, or no plain file.

    Attributes:
        problem: What is wrong with it, without saying where: ``is missing``.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where} {problem}")
        self.where = where
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.where, self.problem)


class NotStored(StoredFileError):
    """There is no such file."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing.

    Attributes:
        path: Relative to the place.
        size: Bytes.
        modified: Seconds since 1970 by the clock of the store.
        version: Changes whenever the content does: the store's own tag, or size and time.
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
        skipped: Reason and relative path of each entry that was passed over, such as a broken link.
    """

    files: Sequence[StoredFile]
    skipped: Sequence[tuple[str, str]] = ()


def check_relative(place: str, relative: str) -> str:
    """Refuse a name that could lead out of the place.

    Raises:
        CacheCorrupt: It is absolute, empty, climbs with ``..``, or is not written plainly.
    """
    parts = PurePosixPath(relative)
    strange = ".." in parts.parts or "\\" in relative or "\0" in relative
    if parts.is_absolute() or not parts.parts or strange:
        raise CacheCorrupt(f"{place}: {relative!r} is not a path inside the cache")
    return str(parts)


class Storage(ABC):
    """Files below one place. Safe to pickle, and to use from several threads.

    Attributes:
        place: Folder or URL that was opened, for messages; without credentials.
        is_remote: Whether reading goes over a network.
        commits_together: Whether files are better written by :meth:`commit_all` than one by one.
    """

    place: str
    is_remote: bool = True
    commits_together: bool = False

    def locate(self, relative: str) -> str:
        """Full path or URL of a file, for messages."""
        return f"{self.place}/{relative}"

    @abstractmethod
    def below(self, folder: str) -> "Storage":
        """The files below a folder of this place, read in the same way."""

    @abstractmethod
    def read(self, relative: str, *, max_bytes: int, sha256: str | None = None) -> bytes:
        """The whole content of a file, whose size is known before memory is taken.

        Args:
            relative: Path below the place.
            max_bytes: Largest size accepted.
            sha256: Hash the content is to have, where known. A cache finds it by this; nothing
                is checked here.

        Raises:
            NotStored: There is no such file.
            StoredFileError: It is no plain file, or larger than ``max_bytes``.
            CacheCorrupt: ``relative`` leads out of the place.
            EnvironmentFault: The store cannot be reached or does not let us in.
        """

    @abstractmethod
    def read_range(
        self, relative: str, start: int, length: int, *, version: str | None = None
    ) -> bytes:
        """Exactly ``length`` bytes from ``start`` on.

        Args:
            relative: Path below the place.
            start: First byte.
            length: Number of bytes.
            version: Of the file (:attr:`StoredFile.version`), where known. With it, a local cache
                fetches the whole file once and serves its parts from there.

        Raises:
            StoredFileError: Missing, or it ends before; and as for :meth:`read`.
        """

    @abstractmethod
    def stream(self, relative: str) -> Iterator[bytes]:
        """The whole content in pieces of a few megabytes, so that its size costs no memory.

        Raises:
            StoredFileError: Missing, or it ended before the size that was announced.
        """

    def open(self, relative: str, *, version: str | None = None) -> BinaryIO:
        """The content as a file that is read from its start; it may not be able to seek.

        Args:
            relative: Path below the place.
            version: As for :meth:`read_range`.
        """
        del version
        return io.BufferedReader(_Pieces(self.stream(relative)), io.DEFAULT_BUFFER_SIZE)

    @abstractmethod
    def describe(self, relative: str) -> StoredFile | None:
        """Size, time and version of a file, or ``None`` where it does not exist."""

    def size(self, relative: str) -> int | None:
        """Bytes of a file, or ``None`` where it does not exist."""
        found = self.describe(relative)
        return None if found is None else found.size

    def exists(self, relative: str) -> bool:
        """Whether there is such a file."""
        return self.size(relative) is not None

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        """All files below the folder ``prefix``, at any depth; none when there is no such folder.

        A listing may lag behind what was written or deleted a moment ago.

        Raises:
            UsageError: The store cannot list (a web server).
        """

    def listing(self, prefix: str = "") -> Listing:
        """All files below the folder ``prefix``, with the entries that were passed over.

        Raises:
            UsageError: The store cannot list (a web server).
        """
        return Listing(tuple(self.list(prefix)))

    def files(self, prefix: str = "") -> Sequence[StoredFile]:
        """The files directly below the folder ``prefix``, sorted by path.

        Raises:
            UsageError: The store cannot list (a web server).
        """
        depth = prefix.count("/") + 2 if prefix else 1
        found = (file for file in self.list(prefix) if file.path.count("/") + 1 == depth)
        return sorted(found, key=lambda file: file.path)

    @abstractmethod
    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the folders directly below the folder ``prefix``, sorted.

        Raises:
            UsageError: The store cannot list (a web server).
        """

    @abstractmethod
    def commit(self, relative: str, data: bytes | memoryview, *, exclusive: bool = False) -> bool:
        """Write a file so that readers see all of ``data`` or what was there before.

        Args:
            relative: Path below the place.
            data: The whole content.
            exclusive: Write once: leave an existing file alone.

        Returns:
            Whether this call made the file; always true unless ``exclusive``.

        Raises:
            UsageError: The store is read-only.
            EnvironmentFault: Disk full, no permission, store out of reach.
        """

    def commit_all(self, files: Mapping[str, bytes], *, exclusive: bool = False) -> set[str]:
        """Write several files in order, together where the store can; see :meth:`commit`.

        Returns:
            The files that this call made.
        """
        return {
            path for path, data in files.items() if self.commit(path, data, exclusive=exclusive)
        }

    @abstractmethod
    def delete(self, relative: str) -> None:
        """Remove a file; no error where it does not exist."""

    def forget(
        self, relative: str, *, sha256: str | None = None, version: str | None = None
    ) -> bool:
        """Drop any copy kept of a file that turned out damaged.

        Returns:
            Whether reading it once more may give something else.
        """
        del relative, sha256, version
        return self.is_remote


class _Pieces(io.RawIOBase):
    """Reads from pieces that come one after another."""

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
