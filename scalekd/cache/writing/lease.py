"""Leases: the processes that are writing shards now, so that no shard is written twice.

A lease is a small file beside the commit record of its shard. Creating it is atomic and succeeds
for one process only; a thread touches it while the owner lives. It is stale, and anybody may take
it over, when its owner is a dead process of this machine, or when nobody touched it for
``STALE_SECONDS`` by the clock of the file system itself, so that machines need not agree on time.

A lease is taken over by creating a second file, named after the token in the first: of several
processes that found the same owner dead, one creates it. (Replacing the first file, or renaming it
away, lets a slow process remove the fresh lease of a faster one: three of eight racing threads
held a shard.) So the owner is whoever the last file of the chain names, and giving a lease back
removes the chain from its start.

Leases save work; they are not what keeps a cache sound. Should a process stand still for so long
that its shard is taken over, the write-once commit record still lets only one of the two commit.
"""

import contextlib
import json
import os
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from scalekd.cache.layout import LEASE_SUFFIX, RECORDS_FOLDER, Unit, lease_path
from scalekd.storage.files import (
    commit_file,
    explained,
    host_name,
    inside,
    is_alive,
    process_namespace,
    temporary_path,
)

STALE_SECONDS = 180.0  # NFS clients may serve a modification time that is 60 s old
BEAT_SECONDS = 20.0
_MAX_BYTES = 4096


class LeaseHolder(BaseModel):
    """Content of a lease.

    Attributes:
        host: Name of the owner's machine.
        namespace: Process namespace there; containers may share a host's name.
        process: Number of the owning process.
        started: When it started, in the system's ticks: numbers are used again.
        token: Random text that tells a lease from the one that was taken over.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(max_length=256)
    namespace: str = Field(max_length=256)
    process: int = Field(ge=0)
    started: str = Field(max_length=64)
    token: str = Field(pattern="^[0-9a-f]{32}$")

    @classmethod
    def myself(cls) -> Self:
        process = os.getpid()
        return cls(
            host=host_name(),
            namespace=process_namespace(),
            process=process,
            started=_start_of(process),
            token=uuid.uuid4().hex,
        )

    @property
    def is_dead(self) -> bool:
        """Certainly dead. A process of another machine never is; its lease goes stale instead."""
        if (self.host, self.namespace) != (host_name(), process_namespace()):
            return False
        return not is_alive(self.process) or _start_of(self.process) != self.started

    def __str__(self) -> str:
        return f"process {self.process} of {self.host}"


class Leases:
    """The leases of one process in one cache; a context manager that gives all of them back.

    Args:
        root: Folder of the cache.
        stale_seconds: Age at which an untouched lease may be taken over.
        beat_seconds: Time between touches; well below ``stale_seconds``.
    """

    def __init__(
        self,
        root: Path,
        *,
        stale_seconds: float = STALE_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._root = root
        self._stale_seconds = stale_seconds
        self._beat_seconds = beat_seconds
        self._held: dict[Path, tuple[Path, LeaseHolder]] = {}  # own file, by start of its chain
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="cache-leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join()
        for path in list(self._held):
            with contextlib.suppress(OSError):  # what stopped us may also stop this; it goes stale
                self._give_back(path)

    def acquire(self, unit: Unit, shard: int) -> LeaseHolder | None:
        """Take the lease of a shard.

        Returns:
            ``None`` when this process holds it now; otherwise whoever does.

        Raises:
            EnvironmentFault: Disk full, read-only, not permitted.
        """
        path = inside(self._root, lease_path(unit, shard))
        me = LeaseHolder.myself()
        while True:
            with self._lock:
                end, holder = _end_of_chain(path)
                if path in self._held and holder == self._held[path][1]:
                    return None
                if holder is not None and not self._is_stale(end, holder):
                    return holder
                own = end if holder is None else _successor(path, holder)
                if not commit_file(own, me.model_dump_json().encode(), exclusive=True):
                    continue  # somebody else was first
                if _end_of_chain(path) == (own, me):
                    self._held[path] = own, me
                    return None
            own.unlink(missing_ok=True)  # the chain it belonged to was given back meanwhile

    def holds(self, unit: Unit, shard: int) -> bool:
        """Whether the lease is still this process's: it may have stood still for too long."""
        path = inside(self._root, lease_path(unit, shard))
        return path in self._held and _end_of_chain(path) == self._held[path]

    def release(self, unit: Unit, shard: int) -> None:
        """Give a lease back; harmless when it is not held."""
        self._give_back(inside(self._root, lease_path(unit, shard)))

    def _give_back(self, path: Path) -> None:
        with self._lock:
            mine = self._held.pop(path, None)
            if mine is not None and _end_of_chain(path) == mine:
                with explained(path, "cannot remove"):
                    _remove_chain(path)

    def _is_stale(self, path: Path, holder: LeaseHolder) -> bool:
        try:
            return holder.is_dead or _silence(path) > self._stale_seconds
        except FileNotFoundError:
            return False  # given back meanwhile; the next attempt takes it

    def _beat(self) -> None:
        while not self._closing.wait(self._beat_seconds):
            with self._lock:
                for own, me in self._held.values():
                    # A touch that fails is no fault by itself: the lease only ages.
                    with contextlib.suppress(OSError):
                        if _read(own) == me:
                            os.utime(own)


def live_lease(root: Path, *, stale_seconds: float = STALE_SECONDS) -> LeaseHolder | None:
    """Somebody who seems to be at work in the cache, or ``None``."""
    for path in sorted((root / RECORDS_FOLDER).glob(f"*/*{LEASE_SUFFIX}")):
        holder = _read(path)
        if holder is None or holder.is_dead:
            continue
        with contextlib.suppress(FileNotFoundError):
            if _silence(path) <= stale_seconds:
                return holder
    return None


def remove_settled(root: Path) -> None:
    """Remove the leases of committed shards, whose owners died before giving them back."""
    for path in (root / RECORDS_FOLDER).glob(f"*/*{LEASE_SUFFIX}"):
        record = path.with_name(path.name.split(".")[0] + ".json")
        if record.exists():
            with explained(path, "cannot remove"):
                path.unlink(missing_ok=True)


def file_system_time(folder: Path) -> float:
    """What the file system that holds ``folder`` takes the time to be, in seconds."""
    with temporary_path(folder / "clock") as probe, explained(probe, "cannot write"):
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime


def _silence(path: Path) -> float:
    """Seconds since a lease was touched."""
    touched = path.stat().st_mtime
    return file_system_time(path.parent) - touched


def _successor(path: Path, holder: LeaseHolder) -> Path:
    return path.with_name(f"{path.name.removesuffix(LEASE_SUFFIX)}.{holder.token}{LEASE_SUFFIX}")


def _end_of_chain(path: Path) -> tuple[Path, LeaseHolder | None]:
    """The file that counts of a lease, and whom it names; nobody when there is no lease."""
    holder = _read(path)
    if holder is None:
        return path, None
    end = path
    while (after := _read(_successor(path, holder))) is not None:
        end, holder = _successor(path, holder), after
    return end, holder


def _remove_chain(path: Path) -> None:
    """From the start on: what is left, should this be interrupted, hangs on nothing."""
    holder = _read(path)
    path.unlink(missing_ok=True)
    while holder is not None:
        after = _successor(path, holder)
        holder = _read(after)
        after.unlink(missing_ok=True)


def _read(path: Path) -> LeaseHolder | None:
    """Read the owner of a lease; ``None`` if there is no lease. A damaged lease is removed."""
    try:
        with path.open("rb") as file:
            return LeaseHolder.model_validate(json.loads(file.read(_MAX_BYTES)))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        with explained(path, "cannot remove"):
            path.unlink(missing_ok=True)
        return None


def _start_of(process: int) -> str:
    """When a process started, where the system tells; empty elsewhere, and for one that ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # the command may hold blanks: cut after it
