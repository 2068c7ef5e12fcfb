"""Files that are either wholly there or not there, and are checked before they are believed.

A cache is read for years on file systems that fail. Every file it holds is written to a
temporary neighbour, synced, renamed, and its folder synced; every file is read against the
size and SHA-256 that somebody committed for it.
"""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field

from scalekd.errors import CacheCorrupt, EnvironmentFault, advice_on

TEMPORARY_SUFFIX = ".partial"
_READ_CHUNK_BYTES = 1 << 20
_MAX_FILE_BYTES = 4 << 30  # a block of features has at most half of it
_DAY_SECONDS = 24 * 3600
_OWNER = re.compile(r"\.(?P<host>[a-z0-9_]+)-(?P<process>\d+)-[0-9a-f]{8}\.partial$")


class FileDigest(BaseModel):
    """What a committed file must weigh and hash to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int = Field(ge=0, le=_MAX_FILE_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def digest(data: bytes | memoryview) -> FileDigest:
    """Size and SHA-256 of ``data``."""
    return FileDigest(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to do next."""
    try:
        yield
    except OSError as error:
        advice = advice_on(error)
        if advice is None:
            raise
        raise EnvironmentFault(
            f"{doing} {path}: {advice} ({error.strerror}). What was committed is kept."
        ) from error


def commit_file(path: Path, data: bytes | memoryview, *, exclusive: bool = False) -> bool:
    """Write ``path`` so that after a crash it holds all of ``data`` or what it held before.

    Args:
        path: Final name; its folder is made when missing.
        data: The whole content.
        exclusive: Write once: leave an existing file alone.

    Returns:
        Whether this call made the file; always true unless ``exclusive``.

    Raises:
        EnvironmentFault: Disk full, read-only, not permitted.
    """
    temporary = temporary_beside(path)
    with explained(path, "cannot write"):
        _make_folder(path.parent)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if exclusive:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                finally:
                    temporary.unlink()
            else:
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    return True


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of ``path`` that says which process of which machine uses it."""
    owner = f"{host_name()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{owner}{TEMPORARY_SUFFIX}")


def remove_abandoned(root: Path) -> None:
    """Delete the temporary files of writers that are dead for certain.

    The name of a temporary file says which process of which machine made it. Those of this
    machine's dead processes go at once; those of other machines after a day. So do the folders
    in which a repair works, but only those of this machine: their age says little.
    """
    for path in list(root.rglob(f".*{TEMPORARY_SUFFIX}")):
        owner = _OWNER.search(path.name)
        is_folder = path.is_dir() and not path.is_symlink()
        try:
            if owner and owner["host"] == host_name():
                abandoned = not is_alive(int(owner["process"]))
            else:
                abandoned = not is_folder and path.stat().st_mtime < time.time() - _DAY_SECONDS
            if abandoned and is_folder:
                shutil.rmtree(path)
            elif abandoned:
                path.unlink()
        except FileNotFoundError:
            continue  # its writer finished or another process tidied up meanwhile


def host_name() -> str:
    """This machine's name, in letters that a file's name may hold."""
    return re.sub(r"[^a-z0-9_]", "_", socket.gethostname().lower()) or "unnamed"


def is_alive(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process: alive
    return True


def _make_folder(folder: Path) -> None:
    """Make a folder that survives a power cut: a new folder is an entry of its parent."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(root: Path, relative: str) -> Path:
    """The path of ``relative`` below ``root``, refusing anything that could lead elsewhere.

    Raises:
        CacheCorrupt: ``relative`` is absolute, climbs with ``..``, or passes a symbolic link.
    """
    parts = PurePosixPath(relative)
    strange = ".." in parts.parts or "\\" in relative or "\0" in relative
    if parts.is_absolute() or not parts.parts or strange:
        raise CacheCorrupt(f"{root}: {relative!r} is not a path inside the cache")
    path = root
    for part in parts.parts:
        path = path / part
        if path.is_symlink():
            raise CacheCorrupt(f"{path} is a symbolic link; a cache holds plain files only")
    return path


def read_bounded(path: Path, *, max_bytes: int, what: str) -> bytes:
    """The whole of a plain file that may not be larger than ``max_bytes``.

    Raises:
        CacheCorrupt: The file is missing, not a plain file, or too large.
    """
    with explained(path, "cannot read"):
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise CacheCorrupt(f"{path}: {what} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise CacheCorrupt(f"{path}: {what} is not a plain file")
    if status.st_size > max_bytes:
        raise CacheCorrupt(
            f"{path}: {what} has {status.st_size:,} bytes, more than the {max_bytes:,} allowed"
        )
    with explained(path, "cannot read"):
        return path.read_bytes()


def check(path: Path, data: bytes | memoryview, expected: FileDigest) -> None:
    """Raise ``CacheCorrupt`` unless ``data`` is what was committed at ``path``."""
    if len(data) != expected.num_bytes:
        raise CacheCorrupt(
            f"{path} has {len(data):,} bytes, {expected.num_bytes:,} were committed"
            " (run `scalekd cache verify`, then redo the damaged shard)"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != expected.sha256:
        raise CacheCorrupt(
            f"{path}: its bytes changed since they were committed (SHA-256 {found[:12]}… found,"
            f" {expected.sha256[:12]}… committed; run `scalekd cache verify`)"
        )


def read_checked(root: Path, relative: str, expected: FileDigest) -> bytes:
    """The content of a committed file, or ``CacheCorrupt`` when it is not as committed."""
    path = inside(root, relative)
    data = read_bounded(path, max_bytes=expected.num_bytes, what="a committed file")
    check(path, data, expected)
    return data


class CommittedFiles:
    """Reads only files it has a digest for, whole, and refuses any that differ."""

    def __init__(self, root: Path, expected: dict[str, FileDigest]) -> None:
        self.root = root
        self._expected = expected

    def expect(self, files: dict[str, FileDigest]) -> None:
        """Add files that a commit record names."""
        self._expected.update(files)

    def read(self, relative: str, *, max_bytes: int | None = None) -> bytes:
        """The content of a file.

        Raises:
            CacheCorrupt: Nobody committed it, it is larger than it may be, or it has changed.
        """
        expected = self._expected.get(relative)
        if expected is None:
            raise CacheCorrupt(f"{self.root / relative}: no commit record names this file")
        if max_bytes is not None and expected.num_bytes > max_bytes:
            raise CacheCorrupt(
                f"{self.root / relative}: {expected.num_bytes:,} bytes are more than the"
                f" {max_bytes:,} allowed"
            )
        return read_checked(self.root, relative, expected)


def digest_on_disk(path: Path) -> FileDigest:
    """Size and SHA-256 of a file, read in pieces so that its size costs no memory."""
    hasher, size = hashlib.sha256(), 0
    with explained(path, "cannot read"), path.open("rb") as file:
        while piece := file.read(_READ_CHUNK_BYTES):
            hasher.update(piece)
            size += len(piece)
    return FileDigest(num_bytes=size, sha256=hasher.hexdigest())
