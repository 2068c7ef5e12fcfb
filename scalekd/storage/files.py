"""Files of a folder that are either wholly there or not there.

Every file is written to a temporary neighbour, synced, renamed, and its folder synced, so that
after a crash it holds all of its content or what it held before.
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


def commit_file(
    path: Path,
    data: bytes | memoryview,
    *,
    exclusive: bool = False,
    check: Callable[[], None] | None = None,
) -> bool:
    """Write ``path`` so that after a crash it holds all of ``data`` or what it held before.

    Args:
        path: Final name; its folder is made when missing.
        data: The whole content.
        exclusive: Write once: leave an existing file alone.
        check: Called immediately before the file gets its name; what it raises keeps it from that.

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
            if check is not None:
                check()
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
    owner = f"{host_name()}-{_namespace_number()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{owner}{TEMPORARY_SUFFIX}")


def remove_abandoned(root: Path) -> None:
    """Delete the temporary files of writers that are dead for certain.

    The name of a temporary file says which process of which machine made it. Those of this
    machine's dead processes go at once; those of other machines, and of containers with processes
    of their own, after a day. So do the folders in which a repair works, but only those of this
    machine, since age proves nothing there.
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
            continue  # its writer finished or another process tidied up meanwhile


def host_name() -> str:
    """This machine's name, in letters that a file's name may hold."""
    return re.sub(r"[^a-z0-9_]", "_", socket.gethostname().lower()) or "unnamed"


def process_namespace() -> str:
    """The namespace that a process number belongs to; empty where the system has none.

    Containers on one machine may share its name and not its processes.
    """
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (Path would read it as a path)
    except OSError:
        return ""


def _namespace_number() -> str:
    """The digits of ``pid:[4026531836]``."""
    return "".join(filter(str.isdigit, process_namespace()))


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
    path = root
    for part in check_relative(str(root), relative).split("/"):
        path = path / part
        if path.is_symlink():
            raise CacheCorrupt(f"{path} is a symbolic link; a cache holds plain files only")
    return path
