"""Committing to a store without renames: the files of a shard first, then its record, write-once.

A shard is written to a folder of this machine and sent when it is whole. No file on a store is
replaced while it may count: one that stands there with the same bytes is taken as it is, and one
with other bytes only gives way when no record names it and nobody has touched it for an hour, as
when a job was killed and goes on on a machine that computes otherwise. Writing it takes minutes.
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from scalekd.cache.files import FileDigest, digest_of, read_checked
from scalekd.cache.layout import COMPANIONS, MANIFEST_FILE, PLAN_FILE, Unit
from scalekd.cache.records import has_record
from scalekd.errors import CacheMismatch, UsageError
from scalekd.storage import LocalStorage, Storage

_IN_FLIGHT = 8
_ABANDONED_SECONDS = 3600.0


def send_files(
    folder: LocalStorage, place: Storage, files: dict[str, FileDigest], unit: Unit, shard: int
) -> None:
    """Send the files of a shard, each held against its digest when it is read.

    Raises:
        CacheMismatch: Another job wrote, or is writing, the shard with other bytes.
        EnvironmentFault: The store cannot be reached or refuses.
    """

    def send(paths: Sequence[str]) -> None:
        data = {path: read_checked(folder, path, files[path]) for path in paths}
        for path in data.keys() - place.commit_all(data, exclusive=True):
            if not _stands(place, path, files[path]):
                _check_abandoned(place, path, unit, shard)
                place.commit(path, data[path])

    if place.commits_together:
        send(list(files))
        return
    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="publish") as threads:
        for sent in [threads.submit(send, (path,)) for path in files]:
            sent.result()


def _stands(place: Storage, path: str, expected: FileDigest) -> bool:
    """Whether the very same file is there already."""
    return place.size(path) == expected.num_bytes and digest_of(place.stream(path)) == expected


def _check_abandoned(place: Storage, path: str, unit: Unit, shard: int) -> None:
    """Raise unless a file with other bytes is certainly nobody's."""
    committed = has_record(place, unit, shard)
    found = place.describe(path)
    if found is None or (not committed and time.time() - found.modified > _ABANDONED_SECONDS):
        return
    how = "is writing" if not committed else "has committed"
    raise CacheMismatch(
        f"{place.locate(path)}: stands there with other bytes: another job {how} shard {shard} of"
        f" {unit if isinstance(unit, str) else f'pass {unit}'}, on a machine that computes"
        " otherwise. Give each job its own --shards"
        + ("" if committed else "; if that job was killed, run this command again in an hour")
    )


def all_recorded(place: Storage, units: Sequence[Unit], shards: Iterable[int]) -> bool:
    """Whether every shard of every unit is committed; asks a remote store for several at once."""
    pairs = [(unit, shard) for unit in units for shard in shards]
    if not place.is_remote:
        return all(has_record(place, *pair) for pair in pairs)
    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="publish") as threads:
        return all(threads.map(lambda pair: has_record(place, *pair), pairs))


def remove_remote(place: Storage, names: frozenset[str]) -> None:
    """Delete a cache from a store, and nothing but a cache; its plan goes last.

    Raises:
        UsageError: Something else stands there; nothing was deleted.
    """
    paths = [file.path for file in place.list() if file.path not in COMPANIONS]
    strangers = sorted({path for path in paths if path.split("/")[0] not in names})
    if strangers:
        raise UsageError(
            f"{place.place} holds something that is no cache ({', '.join(strangers[:3])}); choose"
            " an empty or new place"
        )
    place.delete(MANIFEST_FILE)
    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="publish") as threads:
        for deleted in [
            threads.submit(place.delete, path)
            for path in paths
            if path not in (MANIFEST_FILE, PLAN_FILE)
        ]:
            deleted.result()
    place.delete(PLAN_FILE)
