"""Commit shards to a remote store, and delete caches there.

A shard is written to a local folder and sent when it is complete: its files first, then its record.
An existing file with the same bytes is kept. One with other bytes is replaced only if no record
names it and it is more than an hour old: a killed job was continued on a machine that rounds
differently. A job that is still running takes minutes for a file.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from scalekd.cache.files import FileDigest, holds, read_checked
from scalekd.cache.layout import COMPANIONS, MANIFEST_FILE, PLAN_FILE, ShardId
from scalekd.errors import CacheMismatch, UsageError
from scalekd.storage import LocalStorage, Storage

_IN_FLIGHT = 8
_ABANDONED_SECONDS = 3600.0


def send_files(
    folder: LocalStorage, storage: Storage, files: dict[str, FileDigest], shard: ShardId
) -> None:
    """Send the files of a shard; the digest of each is checked when it is read.

    Raises:
        CacheMismatch: Another job wrote, or is writing, the shard with other bytes.
        EnvironmentFault: The store cannot be reached, or rejects the request.
    """

    def send(paths: Sequence[str]) -> None:
        data = {path: read_checked(folder, path, files[path]) for path in paths}
        for path in data.keys() - storage.commit_all(data, exclusive=True):
            if not holds(storage, path, files[path]):
                _check_abandoned(storage, path, shard)
                storage.commit(path, data[path])

    if storage.commits_together:
        send(list(files))
        return
    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="publish") as threads:
        for sent in [threads.submit(send, (path,)) for path in files]:
            sent.result()


def _check_abandoned(storage: Storage, path: str, shard: ShardId) -> None:
    """Check that a file with other bytes was left by a job that has ended.

    Raises:
        CacheMismatch: Another job has committed the shard, or may be writing it.
    """
    committed = storage.exists(shard.record_path)
    stored = storage.describe(path)
    if stored is None or (not committed and time.time() - stored.modified > _ABANDONED_SECONDS):
        return
    how = "is writing" if not committed else "has committed"
    raise CacheMismatch(
        f"{storage.locate(path)} has other bytes: another job {how} {shard} on a machine that"
        " rounds differently. Give each job its own --shards"
        + ("" if committed else "; if that job was killed, run this command again in an hour")
    )


def remove_remote(storage: Storage, names: frozenset[str]) -> None:
    """Delete a cache from a remote store; its plan is deleted last.

    Args:
        storage: Storage of the cache.
        names: Names that a cache may have at its top level.

    Raises:
        UsageError: The location contains other files; nothing was deleted.
    """
    paths = [file.path for file in storage.list() if file.path not in COMPANIONS]
    unexpected = sorted({path for path in paths if path.split("/")[0] not in names})
    if unexpected:
        raise UsageError(
            f"{storage.location} contains files that are not part of a cache"
            f" ({', '.join(unexpected[:3])}); choose an empty or new location"
        )
    storage.delete(MANIFEST_FILE)
    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="publish") as threads:
        for deleted in [
            threads.submit(storage.delete, path)
            for path in paths
            if path not in (MANIFEST_FILE, PLAN_FILE)
        ]:
            deleted.result()
    storage.delete(PLAN_FILE)
