"""Commit records: the write-once proof that a shard is complete, and what it consists of."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from scalekd.cache.files import read_bounded
from scalekd.cache.layout import Layout, Unit, record_path
from scalekd.cache.manifest import (
    MAX_JSON_BYTES,
    Plan,
    ShardRecord,
    canonical,
    parse_committed,
)
from scalekd.errors import CacheCorrupt, CacheMismatch
from scalekd.storage import Place, open_storage


def samples_hash(
    keys: Iterable[str], labels: np.ndarray[Any, Any], source_hashes: np.ndarray[Any, Any]
) -> str:
    """Hash of a shard's samples in order: keys, in which no newline stands, labels, images."""
    hasher = hashlib.sha256("\n".join(keys).encode())
    hasher.update(np.ascontiguousarray(labels, "<i4").tobytes())
    hasher.update(np.ascontiguousarray(source_hashes, "<u8").tobytes())
    return hasher.hexdigest()


def write_record(place: Place, record: ShardRecord) -> None:
    """Commit a shard. A record that another process wrote for the same bytes is left as it is.

    Raises:
        CacheMismatch: The shard was committed meanwhile with other bytes.
    """
    storage, path = open_storage(place), record_path(record.unit, record.shard)
    content = canonical(record)
    if not storage.commit(path, content, exclusive=True):
        found = read_bounded(storage, path, max_bytes=MAX_JSON_BYTES, what="a commit record")
        committed = parse_committed(ShardRecord, found, where=storage.locate(path))
        if canonical(committed.model_copy(update={"computed": record.computed})) != content:
            raise CacheMismatch(
                f"{storage.locate(path)}: another process committed this shard with other bytes."
                " Two jobs write this cache on machines that do not compute alike; give each its"
                " own --shards"
            )


def read_record(
    place: Place,
    plan: Plan,
    layout: Layout,
    unit: Unit,
    shard: int,
    *,
    sha256: str | None = None,
) -> ShardRecord:
    """Read a commit record and check that it is the record of this shard of this cache.

    Args:
        place: Where the cache is.
        plan: Of the cache.
        layout: Of the cache.
        unit: Of the record.
        shard: Of the record.
        sha256: Hash of the record's file where the manifest tells; not checked here.

    Raises:
        CacheCorrupt: Missing, damaged, swapped, or naming other files than the layout's.
        CacheMismatch: It belongs to another cache.
    """
    storage, relative = open_storage(place), record_path(unit, shard)
    path = storage.locate(relative)
    data = read_bounded(
        storage, relative, max_bytes=MAX_JSON_BYTES, what="a commit record", sha256=sha256
    )
    record = parse_committed(ShardRecord, data, where=path)
    if record.cache_id != plan.cache_id:
        raise CacheMismatch(
            f"{path}: this shard belongs to cache {record.cache_id[:12]}…, this is"
            f" {plan.cache_id[:12]}…"
        )
    if (record.unit, record.shard) != (unit, shard):
        raise CacheCorrupt(
            f"{path}: holds the record of {record.unit!r}, shard {record.shard}: files were swapped"
        )
    if record.num_rows + len(record.skipped) != plan.identity.rows_of(shard):
        raise CacheCorrupt(
            f"{path}: {record.num_rows} rows and {len(record.skipped)} skipped samples do not make"
            f" the shard's {plan.identity.rows_of(shard)}"
        )
    expected = set(layout.unit_files(unit, shard, record.num_rows))
    if set(record.files) != expected:
        odd = sorted(set(record.files) ^ expected)[0]
        raise CacheCorrupt(f"{path}: names other files than shard {shard} has, such as {odd!r}")
    return record


def has_record(place: Place, unit: Unit, shard: int) -> bool:
    return open_storage(place).exists(record_path(unit, shard))


def record_hash(record: ShardRecord) -> str:
    """SHA-256 of the record's file."""
    return hashlib.sha256(canonical(record)).hexdigest()
