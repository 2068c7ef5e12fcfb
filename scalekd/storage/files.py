"""Atomic writes of local files, and removal of the temporary files of dead writers.

Every file is written to a temporary file in the same folder, synced and renamed, and its folder is
synced, so that after a crash it has its whole new content or its whole previous content.
"""

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from scalekd.errors import CacheCorrupt, EnvironmentFault, advice_on
from scalekd.storage.base import check_relative

TEMPORARY_SUFFIX = ".partial"
_DAY_SECONDS = 24 * 3600
_OWNER = re.compile(
    r"\.(?P<host>[a-z0-9_]+)-(?P<namespace>\d*)-(?P<process>\d+)-[0-9a-f]{8}\.partial$"
)


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Convert errors of the operating system to an :class:`EnvironmentFault` with advice."""
    try:
        yield
    except OSError as error:
        advice = advice_on(error)
        if advice is None:
            raise
        raise EnvironmentFault(
            f"{doing} {path}: {advice} ({error.strerror}). What was committed is kept."
        ) from error


def commit_file(
    path: Path,
    data: bytes | memoryview,
    *,
    exclusive: bool = False,
    check: Callable[[], None] | None = None,
) -> bool:
    """Write a file so that after a crash it has all of ``data`` or its whole previous content.

    Args:
        path: Final path; a missing folder is created.
        data: The whole content.
        exclusive: Leave an existing file unchanged.
        check: Called immediately before the file gets its name; if it raises, nothing is written.

    Returns:
        Whether this call wrote the file; always true unless ``exclusive``.

    Raises:
        EnvironmentFault: The disk is full or read-only, or permission is denied.
    """
    with explained(path, "cannot write"):
        _make_folder(path.parent)
        with temporary_path(path) as temporary:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check()
            if exclusive:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            else:
                temporary.replace(path)
        sync(path.parent)
    return True


@contextlib.contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Yield a new path beside ``path``; at the end, delete the file or folder at this path, if any.

    :func:`remove_abandoned` deletes those of killed processes.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """Return a new path in the folder of ``path`` whose name contains machine and process."""
    owner = f"{host_name()}-{_namespace_number()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{owner}{TEMPORARY_SUFFIX}")


def remove_abandoned(root: Path) -> None:
    """Delete the temporary files of writers that have ended.

    The name of a temporary file contains the machine and process that made it. Files of this
    machine's ended processes are deleted at once; those of other machines, and of containers with
    their own process numbers, after a day. Working folders of a repair are deleted only if they
    belong to this machine, since their age does not show that the repair has ended.
    """
    here = host_name(), _namespace_number()
    for path in list(root.rglob(f".*{TEMPORARY_SUFFIX}")):
        owner = _OWNER.search(path.name)
        is_folder = path.is_dir() and not path.is_symlink()
        try:
            if owner and (owner["host"], owner["namespace"]) == here:
                abandoned = not is_alive(int(owner["process"]))
            else:
                abandoned = not is_folder and path.stat().st_mtime < time.time() - _DAY_SECONDS
            if abandoned and is_folder:
                shutil.rmtree(path)
            elif abandoned:
                path.unlink()
        except FileNotFoundError:
            continue  # renamed by its writer, or deleted by another process


def host_name() -> str:
    """Return this machine's name, in characters that are safe in a file name."""
    return re.sub(r"[^a-z0-9_]", "_", socket.gethostname().lower()) or "unnamed"


def process_namespace() -> str:
    """Return the namespace that process numbers belong to; empty if the system has none.

    Containers on one machine may share its name but not its process numbers.
    """
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (Path would read it as a path)
    except OSError:
        return ""


def _namespace_number() -> str:
    """Return the digits of the namespace, such as those of ``pid:[4026531836]``."""
    return "".join(filter(str.isdigit, process_namespace()))


def is_alive(process: int) -> bool:
    """Return whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # a process of another user: alive
    return True


def _make_folder(folder: Path) -> None:
    """Create a folder and sync its parents, so that it survives a power failure."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(root: Path, relative: str) -> Path:
    """Return the path of ``relative`` below ``root``; refuse one that could lead elsewhere.

    Raises:
        CacheCorrupt: ``relative`` is absolute, contains ``..``, or passes a symbolic link.
    """
    path = root
    for part in check_relative(str(root), relative).split("/"):
        path = path / part
        if path.is_symlink():
            raise CacheCorrupt(f"{path} is a symbolic link; a cache contains plain files only")
    return path
