"""Copies of remote files on a local disk, so that a file is fetched only once.

A file with a known digest is kept under this digest. To read parts of a larger file (an image of a
tar shard), the whole file is kept, under its location, name and version. Other files are not kept,
because they may change.

Any number of processes can share one folder. A complete copy appears by a rename. If several
processes need the same file, one fetches it and the others wait. The least recently used copies are
evicted first.

Copies are not trusted: callers check the digest, and call :meth:`~CachedStorage.forget` if it does
not match.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from scalekd.errors import EnvironmentFault
from scalekd.storage.base import Storage, StoredFile, StoredFileError
from scalekd.storage.files import explained, remove_abandoned, temporary_path
from scalekd.storage.locks import lock

_KEPT_AFTER_EVICTION = 0.9  # of the limit, so that not every new file causes an eviction
_LOCK_SUFFIX = ".lock"
_USAGE_FILE = "usage"


@dataclass(frozen=True)
class LocalCache:
    """A folder for copies of remote files.

    Attributes:
        folder: Folder of the copies. It is created if missing, and must not contain other files.
        max_bytes: Largest total size of the copies in bytes.
    """

    folder: Path
    max_bytes: int

    def over(self, storage: Storage) -> Storage:
        """Return a storage that reads ``storage`` through this cache; a local one is unchanged."""
        return CachedStorage(storage, self) if storage.is_remote else storage

    def find(self, key: str) -> BinaryIO | None:
        """Open the copy under ``key`` and mark it as used; return ``None`` if there is no copy."""
        path = self._path(key)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # another process may evict it at this moment
            os.utime(path)
        return file

    def fetch(self, key: str, size: int, fill: Callable[[BinaryIO], None]) -> BinaryIO:
        """Open the copy under ``key``; make it with ``fill`` unless another process has made it.

        Args:
            key: Hexadecimal name of the copy.
            size: Largest size of the copy in bytes.
            fill: Function that writes the content. If it raises, no copy is kept.
        """
        path = self._path(key)
        with explained(path, "cannot keep a copy at"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(path.name + _LOCK_SUFFIX), once=True):
                existing = self.find(key)
                if existing is not None:
                    return existing
                with temporary_path(path) as temporary:
                    with self._counting():
                        self._make_room(size)
                        with temporary.open("xb") as file:
                            file.truncate(size)  # an eviction counts the file with its full size
                    with temporary.open("r+b") as file:
                        fill(file)
                        unused = size - file.tell()
                        file.truncate()
                    kept = temporary.open("rb")  # readable even if it is evicted at once
                    with self._counting():
                        temporary.replace(path)
                        self._book(-unused)
                    return kept

    def drop(self, key: str) -> None:
        """Delete the copy under ``key``, if there is one."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _counting(self) -> AbstractContextManager[None]:
        """Return a lock; while it is held, no copy is added or renamed."""
        return _locked(self.folder / f"{_USAGE_FILE}{_LOCK_SUFFIX}")

    def _make_room(self, size: int) -> None:
        """Reserve ``size`` bytes; evict the least recently used copies if the limit is exceeded."""
        if self._book(size) > self.max_bytes:
            self._book(size, used=self._evict(self.max_bytes - size))

    def _book(self, size: int, *, used: int | None = None) -> int:
        """Add to the recorded total size of all copies, and return the total."""
        usage = self.folder / _USAGE_FILE
        if used is None:
            try:
                used = int(usage.read_text())
            except (FileNotFoundError, ValueError):
                used = self.max_bytes  # unknown: an eviction will count the copies
        usage.write_text(str(used + size))
        return used + size

    def _evict(self, allowed: int) -> int:
        """Delete the oldest copies until ``allowed`` bytes are left; return the bytes left."""
        remove_abandoned(self.folder)
        copies = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                copies.append((status.st_mtime_ns, status.st_size, path))
        used = sum(size for _, size, _ in copies)
        if used <= allowed:
            return used
        for _, size, path in sorted(copies):
            if used <= allowed * _KEPT_AFTER_EVICTION:
                break
            if path.suffix != _LOCK_SUFFIX and not path.name.startswith("."):  # being written
                path.unlink(missing_ok=True)
                used -= size
        return used


class CachedStorage(Storage):
    """A storage that reads ``origin`` through a :class:`LocalCache`."""

    def __init__(self, origin: Storage, cache: LocalCache) -> None:
        self.origin = origin
        self.cache = cache
        self.location = origin.location
        self.commits_together = origin.commits_together

    def below(self, folder: str) -> "CachedStorage":
        return CachedStorage(self.origin.below(folder), self.cache)

    def read(self, relative: str, *, max_bytes: int, sha256: str | None = None) -> bytes:
        if sha256 is None:
            return self.origin.read(relative, max_bytes=max_bytes)
        kept = self.cache.find(sha256)
        if kept is not None:
            with kept:
                if os.fstat(kept.fileno()).st_size <= max_bytes:
                    return kept.read()
            self.cache.drop(sha256)  # the copy is damaged: the content has at most ``max_bytes``
        if max_bytes > self.cache.max_bytes:
            return self.origin.read(relative, max_bytes=max_bytes)

        def fill(file: BinaryIO) -> None:
            file.write(self.origin.read(relative, max_bytes=max_bytes))

        with self.cache.fetch(sha256, max_bytes, fill) as kept:
            return kept.read()

    def read_range(
        self, relative: str, start: int, length: int, *, version: str | None = None
    ) -> bytes:
        kept = self._kept(relative, version)
        if kept is None:
            return self.origin.read_range(relative, start, length)
        with kept:
            kept.seek(start)
            data = kept.read(length)
        if len(data) != length:
            end = start + len(data)
            raise StoredFileError.too_short(self.locate(relative), end, start, length)
        return data

    def stream(self, relative: str) -> Iterator[bytes]:
        return self.origin.stream(relative)

    def open(self, relative: str, *, version: str | None = None) -> BinaryIO:
        kept = self._kept(relative, version)
        return self.origin.open(relative, version=version) if kept is None else kept

    def describe(self, relative: str) -> StoredFile | None:
        return self.origin.describe(relative)

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        return self.origin.list(prefix)

    def folders(self, prefix: str = "") -> Sequence[str]:
        return self.origin.folders(prefix)

    def files(self, prefix: str = "") -> Sequence[StoredFile]:
        return self.origin.files(prefix)

    def commit(self, relative: str, data: bytes | memoryview, *, exclusive: bool = False) -> bool:
        return self.origin.commit(relative, data, exclusive=exclusive)

    def commit_all(self, files: Mapping[str, bytes], *, exclusive: bool = False) -> set[str]:
        return self.origin.commit_all(files, exclusive=exclusive)

    def delete(self, relative: str) -> None:
        self.origin.delete(relative)

    def forget(
        self, relative: str, *, sha256: str | None = None, version: str | None = None
    ) -> bool:
        if sha256 is not None:
            self.cache.drop(sha256)
        if version is not None:
            self.cache.drop(self._key(relative, version))
        return True

    def _key(self, relative: str, version: str) -> str:
        return hashlib.sha256("\0".join((self.location, relative, version)).encode()).hexdigest()

    def _kept(self, relative: str, version: str | None) -> BinaryIO | None:
        """Open a local copy of a whole file; return ``None`` if it cannot be kept."""
        if version is None:
            return None
        key = self._key(relative, version)
        kept = self.cache.find(key)
        if kept is not None:
            return kept
        size = int(version.partition("-")[0])
        if size > self.cache.max_bytes:
            return None

        def fill(file: BinaryIO) -> None:
            num_bytes = sum(file.write(piece) for piece in self.origin.stream(relative))
            if num_bytes != size:
                raise StoredFileError(
                    self.locate(relative),
                    f"has {num_bytes:,} bytes, but had {size:,} when it was opened",
                )
            file.flush()
            os.fsync(file.fileno())  # there is no digest to detect an incomplete copy

        return self.cache.fetch(key, size, fill)


@contextmanager
def _locked(path: Path, *, once: bool = False) -> Iterator[None]:
    """Hold a lock between processes and threads; the system releases it if the process ends.

    Args:
        path: File of the lock, created if missing.
        once: Whether to delete the file at the end. Processes that waited for it create it again.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            lock(descriptor)
            if not _is_at(descriptor, path):
                continue  # removed by its last owner
            try:
                yield
            finally:
                if once:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def make_local_cache(folder: str | None, max_bytes: int) -> LocalCache | None:
    """Open a local cache in a folder, which is created if missing.

    Args:
        folder: Folder of the copies; ``None`` returns ``None``.
        max_bytes: Largest total size of the copies in bytes.

    Raises:
        EnvironmentFault: The folder cannot be written to.
    """
    if folder is None:
        return None
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with temporary_path(path / "probe") as probe:
            probe.touch()
    except OSError as error:
        raise EnvironmentFault(
            f"--local-cache {folder}: cannot be written to ({error.strerror}); choose another"
            " folder"
        ) from error
    return LocalCache(path, max_bytes)
