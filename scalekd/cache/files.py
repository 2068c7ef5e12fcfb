"""Files that are checked before they are believed.

A cache is read for years on stores that fail. Every file of it is read against the size and
SHA-256 that somebody committed for it.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from scalekd.errors import CacheCorrupt
from scalekd.storage import LocalStorage, NotStored, Storage, StoredFileError

Checked = TypeVar("Checked")

MAX_FILE_BYTES = 4 << 30  # a block of features has at most half of it


class FileDigest(BaseModel):
    """Size and SHA-256 of a committed file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int = Field(ge=0, le=MAX_FILE_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def digest(data: bytes | memoryview) -> FileDigest:
    """Size and SHA-256 of ``data``."""
    return FileDigest(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def digest_of(pieces: Iterable[bytes]) -> FileDigest:
    """Size and SHA-256 of a content that comes in pieces, so that its size costs no memory."""
    hasher, size = hashlib.sha256(), 0
    for piece in pieces:
        hasher.update(piece)
        size += len(piece)
    return FileDigest(num_bytes=size, sha256=hasher.hexdigest())


def digest_on_disk(path: Path) -> FileDigest:
    """Size and SHA-256 of a file of this machine."""
    return digest_of(LocalStorage(path.parent).stream(path.name))


def read_bounded(
    storage: Storage, relative: str, *, max_bytes: int, what: str, sha256: str | None = None
) -> bytes:
    """The whole of a file that may not be larger than ``max_bytes``.

    Args:
        storage: Where the cache is.
        relative: Path inside it.
        max_bytes: Largest size accepted.
        what: The file's name in messages.
        sha256: Its hash where known; not checked here (:meth:`~scalekd.storage.Storage.read`).

    Raises:
        CacheCorrupt: The file is missing, not a plain file, or too large.
    """
    try:
        return storage.read(relative, max_bytes=max_bytes, sha256=sha256)
    except StoredFileError as error:
        raise CacheCorrupt(f"{storage.locate(relative)}: {what} {error.problem}") from None


def check(place: str, data: bytes | memoryview, expected: FileDigest) -> None:
    """Raise ``CacheCorrupt`` unless ``data`` is what was committed at ``place``."""
    if len(data) != expected.num_bytes:
        raise CacheCorrupt(
            f"{place} has {len(data):,} bytes, {expected.num_bytes:,} were committed"
            " (run `scalekd cache verify`, then redo the damaged shard)"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != expected.sha256:
        raise CacheCorrupt(
            f"{place}: its bytes changed since they were committed (SHA-256 {found[:12]}… found,"
            f" {expected.sha256[:12]}… committed; run `scalekd cache verify`)"
        )


def file_problem(
    storage: Storage, relative: str, expected: FileDigest, *, quick: bool = False
) -> str | None:
    """Say what is wrong with a committed file; ``None`` when nothing is.

    Args:
        storage: Where the cache is.
        relative: Path inside it.
        expected: What was committed.
        quick: Look at the size alone.
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
    """Whether a file has the very bytes that were, or are to be, committed; reads all of it."""
    wanted = digest(expected) if isinstance(expected, bytes) else expected
    try:
        return file_problem(storage, relative, wanted) is None
    except CacheCorrupt:
        return False  # the path leads out of the cache


def read_checked(storage: Storage, relative: str, expected: FileDigest) -> bytes:
    """The content of a committed file, or ``CacheCorrupt`` when it is not as committed."""

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

    return asking_again(storage, relative, expected.sha256, read)


def asking_again(
    storage: Storage,
    relative: str,
    sha256: str | None,
    read: Callable[[], Checked],
    *,
    version: str | None = None,
) -> Checked:
    """What ``read`` gives; a file that came damaged over a network is fetched once more.

    So is one whose copy in a local cache was damaged.
    """
    try:
        return read()
    except CacheCorrupt:
        if not storage.forget(relative, sha256=sha256, version=version):
            raise
    return read()


class CommittedFiles:
    """Reads only files it has a digest for, whole, and refuses any that differ."""

    def __init__(self, storage: Storage, expected: dict[str, FileDigest]) -> None:
        self.storage = storage
        self._expected = expected

    def expect(self, files: dict[str, FileDigest]) -> None:
        """Add files that a commit record names."""
        self._expected.update(files)

    def read(self, relative: str, *, max_bytes: int | None = None) -> bytes:
        """The content of a file.

        Raises:
            CacheCorrupt: Nobody committed it, it is larger than it may be, or it has changed.
        """
        place, expected = self.storage.locate(relative), self.digest_of(relative)
        if max_bytes is not None and expected.num_bytes > max_bytes:
            raise CacheCorrupt(
                f"{place}: {expected.num_bytes:,} bytes are more than the {max_bytes:,} allowed"
            )
        return read_checked(self.storage, relative, expected)

    def read_range(self, relative: str, start: int, expected: FileDigest) -> bytes:
        """A part of a file, held against a digest of its own.

        Raises:
            CacheCorrupt: Nobody committed it, it ends before, or it has changed.
        """
        place = f"{self.storage.locate(relative)} from byte {start:,} on"
        whole = self.digest_of(relative)
        if start + expected.num_bytes > whole.num_bytes:
            raise CacheCorrupt(f"{place}: has no {expected.num_bytes:,} bytes")
        version = f"{whole.num_bytes}-{whole.sha256}"

        def read() -> bytes:
            try:
                data = self.storage.read_range(relative, start, expected.num_bytes, version=version)
            except StoredFileError as error:
                raise CacheCorrupt(f"{place}: a committed file {error.problem}") from None
            check(place, data, expected)
            return data

        return asking_again(self.storage, relative, None, read, version=version)

    def digest_of(self, relative: str) -> FileDigest:
        """What the whole of a file must weigh and hash to.

        Raises:
            CacheCorrupt: Nobody committed it.
        """
        found = self._expected.get(relative)
        if found is None:
            raise CacheCorrupt(f"{self.storage.locate(relative)}: no commit record names this file")
        return found
