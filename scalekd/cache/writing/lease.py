"""Leases: files that name the process which writes a shard, so that no other process writes it.

A lease is a small file beside the commit record of its shard. Creating it is atomic and succeeds
for one process only; a thread of the owner touches it at intervals. Any process may take over a
*stale* lease: its owner is a process of this machine that has ended, or it was not touched for
``STALE_SECONDS`` by the clock of the file system, so that the clocks of machines need not agree.

A process takes a lease over by creating a second file, whose name contains the token in the first;
of several processes that do so, one succeeds. (If the first file were replaced or renamed, a slow
process could remove the new lease of a faster one: in a test, three of eight threads owned one
shard.) The owner is therefore named by the last file of a chain, and releasing a lease removes the
chain from its start.

Leases avoid double work; a cache is correct without them. If a process is suspended for so long
that its shard is taken over, the commit record, which is written once, lets only one of the two
processes commit.
"""

import contextlib
import json
import os
import threading
import uuid
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field

from scalekd.cache.layout import LEASE_SUFFIX, RECORDS_FOLDER, ShardId, Unit
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


class LeaseHolder(BaseModel, frozen=True, extra="forbid"):
    """Content of a lease.

    Attributes:
        host: Name of the owner's machine.
        namespace: Process namespace on that machine; containers may share the machine's name.
        process: Number of the owning process.
        started: Start time of the process in the system's ticks, because numbers are reused.
        token: Random text that distinguishes leases of the same process.
    """

    host: str = Field(max_length=256)
    namespace: str = Field(max_length=256)
    process: int = Field(ge=0)
    started: str = Field(max_length=64)
    token: str = Field(pattern="^[0-9a-f]{32}$")

    @classmethod
    def myself(cls) -> Self:
        """Return a new holder that describes this process."""
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
        """Whether the process is known to have ended; always false on another machine."""
        if (self.host, self.namespace) != (host_name(), process_namespace()):
            return False
        return not is_alive(self.process) or _start_of(self.process) != self.started

    def __str__(self) -> str:
        return f"process {self.process} of {self.host}"


class Leases:
    """The leases of one process in one cache; a context manager that releases all of them.

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

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join()
        for path in list(self._held):
            with contextlib.suppress(OSError):  # a lease that stays becomes stale
                self._release(path)

    def acquire(self, unit: Unit, shard: int) -> LeaseHolder | None:
        """Take the lease of a shard.

        Returns:
            ``None`` if this process now has the lease; otherwise its holder.

        Raises:
            EnvironmentFault: The disk is full or read-only, or permission is denied.
        """
        path = inside(self._root, ShardId(unit, shard).lease_path)
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
                    continue  # another process was first
                if _end_of_chain(path) == (own, me):
                    self._held[path] = own, me
                    return None
            own.unlink(missing_ok=True)  # the chain it belonged to was released meanwhile

    def holds(self, unit: Unit, shard: int) -> bool:
        """Return whether this process still has a lease, which another may have taken over."""
        path = inside(self._root, ShardId(unit, shard).lease_path)
        return path in self._held and _end_of_chain(path) == self._held[path]

    def release(self, unit: Unit, shard: int) -> None:
        """Release a lease; no effect if this process does not have it."""
        self._release(inside(self._root, ShardId(unit, shard).lease_path))

    def _release(self, path: Path) -> None:
        with self._lock:
            mine = self._held.pop(path, None)
            if mine is not None and _end_of_chain(path) == mine:
                with explained(path, "cannot remove"):
                    _remove_chain(path)

    def _is_stale(self, path: Path, holder: LeaseHolder) -> bool:
        try:
            return holder.is_dead or _silence(path) > self._stale_seconds
        except FileNotFoundError:
            return False  # released meanwhile; the next attempt takes it

    def _beat(self) -> None:
        while not self._closing.wait(self._beat_seconds):
            with self._lock:
                for own, me in self._held.values():
                    # If the file cannot be touched, the lease becomes stale.
                    with contextlib.suppress(OSError):
                        if _read(own) == me:
                            os.utime(own)


def live_lease(root: Path, *, stale_seconds: float = STALE_SECONDS) -> LeaseHolder | None:
    """Return the holder of a lease that is not stale, or ``None``."""
    for path in sorted((root / RECORDS_FOLDER).glob(f"*/*{LEASE_SUFFIX}")):
        holder = _read(path)
        if holder is None or holder.is_dead:
            continue
        with contextlib.suppress(FileNotFoundError):
            if _silence(path) <= stale_seconds:
                return holder
    return None


def remove_settled(root: Path) -> None:
    """Remove the leases of committed shards, whose owners ended without releasing them."""
    for path in (root / RECORDS_FOLDER).glob(f"*/*{LEASE_SUFFIX}"):
        record = path.with_name(path.name.split(".")[0] + ".json")
        if record.exists():
            with explained(path, "cannot remove"):
                path.unlink(missing_ok=True)


def file_system_time(folder: Path) -> float:
    """Return the time in seconds by the clock of the file system that contains a folder."""
    with temporary_path(folder / "clock") as probe, explained(probe, "cannot write"):
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime


def _silence(path: Path) -> float:
    """Return the seconds since a lease was touched."""
    touched = path.stat().st_mtime
    return file_system_time(path.parent) - touched


def _successor(path: Path, holder: LeaseHolder) -> Path:
    return path.with_name(f"{path.name.removesuffix(LEASE_SUFFIX)}.{holder.token}{LEASE_SUFFIX}")


def _end_of_chain(path: Path) -> tuple[Path, LeaseHolder | None]:
    """Return the last file of a lease and the owner it names; ``None`` if there is no lease."""
    holder = _read(path)
    if holder is None:
        return path, None
    end = path
    while (after := _read(_successor(path, holder))) is not None:
        end, holder = _successor(path, holder), after
    return end, holder


def _remove_chain(path: Path) -> None:
    """Delete a lease from its first file on, so that files left by an interruption are unused."""
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
    """Return the start time of a process; empty if it has ended or the system does not tell."""
    try:  # fields are separated by spaces, which the command in parentheses may contain as well
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
