"""Commit records: each is written once, when a shard is complete, and names the shard's files."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import ShardRecord
from scalekd.cache.documents.stored import read_document
from scalekd.cache.layout import ShardId
from scalekd.errors import CacheMismatch
from scalekd.storage import Storage


def samples_hash(
    keys: Iterable[str], labels: np.ndarray[Any, Any], source_hashes: np.ndarray[Any, Any]
) -> str:
    """Return the hash of a shard's samples in order: keys (without newlines), labels, images."""
    hasher = hashlib.sha256("\n".join(keys).encode())
    hasher.update(np.ascontiguousarray(labels, "<i4").tobytes())
    hasher.update(np.ascontiguousarray(source_hashes, "<u8").tobytes())
    return hasher.hexdigest()


def write_record(storage: Storage, record: ShardRecord) -> None:
    """Commit a shard; keep a record that another process wrote for the same files.

    Raises:
        CacheMismatch: Another process committed the shard with other bytes.
    """
    path = ShardId(record.unit, record.shard).record_path
    content = canonical(record)
    if not storage.commit(path, content, exclusive=True):
        committed = read_document(storage, path, ShardRecord, "a commit record")
        if canonical(committed.model_copy(update={"computed": record.computed})) != content:
            raise CacheMismatch(
                f"{storage.locate(path)}: another process committed this shard with other bytes."
                " Two jobs write this cache on machines that round differently; give each its own"
                " --shards"
            )


def record_hash(record: ShardRecord) -> str:
    """Return the SHA-256 of the record's file."""
    return hashlib.sha256(canonical(record)).hexdigest()
