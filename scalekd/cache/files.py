"""Read the files of a cache, checking the size and SHA-256 committed for each of them."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field

from scalekd.errors import CacheCorrupt
from scalekd.storage import LocalStorage, NotStored, Storage, StoredFileError

Checked = TypeVar("Checked")

MAX_FILE_BYTES = 4 << 30  # blocks of features are smaller than half of it


class FileDigest(BaseModel, frozen=True, extra="forbid"):
    """Size and SHA-256 of a committed file."""

    num_bytes: int = Field(ge=0, le=MAX_FILE_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def digest(data: bytes | memoryview) -> FileDigest:
    """Return size and SHA-256 of ``data``."""
    return FileDigest(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def digest_of(pieces: Iterable[bytes]) -> FileDigest:
    """Return size and SHA-256 of a content in pieces, which is never in memory as a whole."""
    hasher, size = hashlib.sha256(), 0
    for piece in pieces:
        hasher.update(piece)
        size += len(piece)
    return FileDigest(num_bytes=size, sha256=hasher.hexdigest())


def digest_on_disk(path: Path) -> FileDigest:
    """Return size and SHA-256 of a local file."""
    return digest_of(LocalStorage(path.parent).stream(path.name))


def read_bounded(
    storage: Storage, relative: str, *, max_bytes: int, what: str, sha256: str | None = None
) -> bytes:
    """Read a whole file of at most ``max_bytes``.

    Args:
        storage: Storage of the cache.
        relative: Path inside the cache.
        max_bytes: Largest size accepted.
        what: Description of the file for messages.
        sha256: SHA-256 of the file if known; see :meth:`scalekd.storage.Storage.read`.

    Raises:
        CacheCorrupt: The file is missing, not a plain file, or too large.
    """
    try:
        return storage.read(relative, max_bytes=max_bytes, sha256=sha256)
    except StoredFileError as error:
        raise CacheCorrupt(f"{storage.locate(relative)}: {what} {error.problem}") from None


def check(where: str, data: bytes | memoryview, expected: FileDigest) -> None:
    """Raise ``CacheCorrupt``, naming the location, unless ``data`` has the expected digest."""
    if len(data) != expected.num_bytes:
        raise CacheCorrupt(
            f"{where} has {len(data):,} bytes, {expected.num_bytes:,} were committed"
            " (run `scalekd cache verify`, then `scalekd cache repair`)"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != expected.sha256:
        raise CacheCorrupt(
            f"{where}: its bytes changed since they were committed (SHA-256 {sha256[:12]}… found,"
            f" {expected.sha256[:12]}… committed; run `scalekd cache verify`)"
        )


def file_problem(
    storage: Storage, relative: str, expected: FileDigest, *, quick: bool = False
) -> str | None:
    """Describe the damage of a committed file; ``None`` if it is intact.

    Args:
        storage: Storage of the cache.
        relative: Path inside the cache.
        expected: Committed size and SHA-256.
        quick: Check only the size.
    """
    try:
        if quick:
            size = storage.size(relative)
            if size is None:
                return "missing" if not storage.exists(relative) else "not a plain file"
        else:
            stored = digest_of(storage.stream(relative))
            size = stored.num_bytes
    except NotStored:
        return "missing"
    except StoredFileError as error:
        return error.problem.removeprefix("is ")
    if size != expected.num_bytes:
        return f"{size:,} bytes, {expected.num_bytes:,} were committed"
    if not quick and stored != expected:
        return "its bytes changed since they were committed"
    return None


def holds(storage: Storage, relative: str, expected: FileDigest | bytes) -> bool:
    """Return whether a file has the expected digest or bytes; reads the whole file."""
    if isinstance(expected, bytes):
        expected = digest(expected)
    try:
        return file_problem(storage, relative, expected) is None
    except CacheCorrupt:
        return False  # the path leads out of the cache


def read_checked(storage: Storage, relative: str, expected: FileDigest) -> bytes:
    """Read a committed file; raise ``CacheCorrupt`` if it differs from the committed one."""

    def read() -> bytes:
        data = read_bounded(
            storage,
            relative,
            max_bytes=expected.num_bytes,
            what="a committed file",
            sha256=expected.sha256,
        )
        check(storage.locate(relative), data, expected)
        return data

    return read_again_if_corrupt(storage, relative, expected.sha256, read)


def read_again_if_corrupt(
    storage: Storage,
    relative: str,
    sha256: str | None,
    read: Callable[[], Checked],
    *,
    version: str | None = None,
) -> Checked:
    """Return the result of ``read``; try a second time if the first copy may be damaged.

    Copies are damaged in transit or in a local cache, which then drops its copy.

    Args:
        storage: Storage of the cache.
        relative: Path inside the cache.
        sha256: SHA-256 under which a local cache may have a copy.
        read: Function that reads and checks the file.
        version: Version under which a local cache may have a copy.
    """
    try:
        return read()
    except CacheCorrupt:
        if not storage.forget(relative, sha256=sha256, version=version):
            raise
    return read()


class CommittedFiles:
    """Reads files whose digests are known, and raises ``CacheCorrupt`` if they differ.

    Args:
        storage: Storage of the cache.
        expected: Committed size and SHA-256 of files, by path.
    """

    def __init__(self, storage: Storage, expected: dict[str, FileDigest]) -> None:
        self.storage = storage
        self._expected = expected

    def expect(self, files: dict[str, FileDigest]) -> None:
        """Add files that a commit record names."""
        self._expected.update(files)

    def read(self, relative: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole file.

        Raises:
            CacheCorrupt: The file was not committed, is larger than ``max_bytes``, or has changed.
        """
        where, expected = self.storage.locate(relative), self.digest_of(relative)
        if max_bytes is not None and expected.num_bytes > max_bytes:
            raise CacheCorrupt(
                f"{where}: {expected.num_bytes:,} bytes are more than the {max_bytes:,} allowed"
            )
        return read_checked(self.storage, relative, expected)

    def read_range(self, relative: str, start: int, expected: FileDigest) -> bytes:
        """Read a part of a file, and compare it with the digest of the part.

        Raises:
            CacheCorrupt: The file was not committed, is too short, or has changed.
        """
        where = f"{self.storage.locate(relative)} from byte {start:,} on"
        whole = self.digest_of(relative)
        if start + expected.num_bytes > whole.num_bytes:
            raise CacheCorrupt(f"{where}: has no {expected.num_bytes:,} bytes")
        version = f"{whole.num_bytes}-{whole.sha256}"

        def read() -> bytes:
            try:
                data = self.storage.read_range(relative, start, expected.num_bytes, version=version)
            except StoredFileError as error:
                raise CacheCorrupt(f"{where}: a committed file {error.problem}") from None
            check(where, data, expected)
            return data

        return read_again_if_corrupt(self.storage, relative, None, read, version=version)

    def digest_of(self, relative: str) -> FileDigest:
        """Return the committed size and SHA-256 of a file.

        Raises:
            CacheCorrupt: The file was not committed.
        """
        expected = self._expected.get(relative)
        if expected is None:
            raise CacheCorrupt(f"{self.storage.locate(relative)}: no commit record names this file")
        return expected
