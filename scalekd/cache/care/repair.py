"""Find what is damaged in a cache, and restore documents from others that are intact.

The manifest contains the plan and the hashes of all commit records, and a record contains the
digests of its files, so most documents can be made again from the others. The pipeline
:mod:`scalekd.pipelines.repair_cache` writes damaged files again, and compares them with the intact
documents before it replaces any.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import get_args

from scalekd.cache.cache import Cache
from scalekd.cache.documents import MAX_JSON_BYTES, canonical
from scalekd.cache.documents.manifest import Manifest, Plan, ShardRecord
from scalekd.cache.documents.records import record_hash
from scalekd.cache.documents.stored import read_document
from scalekd.cache.files import FileDigest, digest, digest_on_disk
from scalekd.cache.forms import Embed, TarForm
from scalekd.cache.forms.images import IMAGES_FILE, images_documents
from scalekd.cache.forms.webdataset.form import FORM_FILE
from scalekd.cache.layout import (
    MANIFEST_FILE,
    PLAN_FILE,
    RECORDS_FOLDER,
    SAMPLES,
    ShardId,
    Unit,
)
from scalekd.cache.reading.reader import check_folder, read_manifest
from scalekd.cache.writing.planning import read_plan
from scalekd.errors import CacheCorrupt, CacheError, DataError, UsageError
from scalekd.storage import LocalStorage, StoredFileError
from scalekd.storage.files import commit_file, explained, inside


@dataclass(frozen=True)
class DamagedCache:
    """A cache whose plan is known, and its manifest if that is intact.

    Attributes:
        root: Folder of the cache.
        cache: The cache, with the plan that most commit records name.
        manifest: The manifest if it is intact; otherwise it is made again from the records.
        num_passes: Number of passes that the cache must have.
    """

    root: Path
    cache: Cache
    manifest: Manifest | None
    num_passes: int

    @property
    def plan(self) -> Plan:
        """Plan of the cache."""
        return self.cache.plan

    @property
    def units(self) -> tuple[Unit, ...]:
        """The samples and the passes that the cache must have."""
        return (SAMPLES, *range(self.num_passes))

    def record_hash_of(self, shard: ShardId) -> str | None:
        """Return the SHA-256 of a commit record according to the manifest, if there is one."""
        return self.manifest.records.get(shard.record_path) if self.manifest else None


@dataclass(frozen=True)
class ShardDamage:
    """One damaged shard.

    Attributes:
        shard: The shard.
        record: Commit record of the shard, if it is intact.
        files: Files that differ from the commit record; all files if there is no record.
    """

    shard: ShardId
    record: ShardRecord | None
    files: tuple[str, ...]


def open_damaged(root: Path) -> DamagedCache:
    """Read plan and manifest; if they differ, choose the one that more commit records name.

    Raises:
        DataError: The folder does not contain a cache.
        CacheCorrupt: Neither plan nor manifest can be read, so the identity is not known.
        CacheMismatch: A later version of the format wrote them.
    """
    check_folder(root)
    manifest, plan = None, None
    problems: list[str] = []
    try:
        manifest = read_manifest(root)
    except (CacheError, DataError) as error:
        problems.append(str(error))
    try:
        plan = read_plan(root)
    except (CacheError, UsageError) as error:
        problems.append(str(error))
    if manifest is None and plan is None:
        manifest = _manifest_in_plan_file(root)
    if manifest is not None and plan is not None and plan.cache_id != manifest.plan.cache_id:
        num_records = _num_records(root)
        if num_records[plan.cache_id] > num_records[manifest.plan.cache_id]:
            manifest = None
    if manifest is not None:
        cache = Cache(root, manifest.plan)
        num_passes = max(manifest.num_passes, _num_complete_passes(cache))
        return DamagedCache(root, cache, manifest, num_passes)
    if plan is not None:
        return DamagedCache(root, Cache(root, plan), None, max(1, _num_begun_passes(root)))
    if not (root / RECORDS_FOLDER).is_dir():
        raise DataError(f"no cache at {root}: it contains no plan, no manifest and no records")
    raise CacheCorrupt(
        f"{root}: neither plan nor manifest can be read, so the cache's content is not known; put"
        f" a copy of either back, or write the cache again ({'; '.join(problems)})"
    )


def _manifest_in_plan_file(root: Path) -> Manifest | None:
    """Read the manifest from the plan's file, in case the two files were swapped."""
    try:
        manifest = read_document(LocalStorage(root), PLAN_FILE, Manifest, "the plan")
    except CacheError:
        return None
    return manifest if manifest.digest else None


def _num_records(root: Path) -> Counter[str]:
    """Count the commit records of each cache, by its identifier."""
    counts: Counter[str] = Counter()
    for path in (root / RECORDS_FOLDER).glob("*/*.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES:
                counts[str(json.loads(path.read_bytes())["cache_id"])] += 1
    return counts


def _num_complete_passes(cache: Cache) -> int:
    """Count the passes, from the first one on, of which every shard is committed."""
    number = 0
    while all(cache.has(ShardId(number, shard)) for shard in range(cache.identity.num_shards)):
        number += 1
    return number


def _num_begun_passes(root: Path) -> int:
    """Count the passes, from the first one on, of which any document exists."""
    number = 0
    while any(
        next(folder.rglob("*.json"), None) is not None
        for folder in (root / f"{RECORDS_FOLDER}/{number:04d}", root / f"passes/{number:04d}")
    ):
        number += 1
    return number


def damaged_form(damaged: DamagedCache) -> dict[str, bytes]:
    """Return the documents of the form that are missing or damaged, with the right content.

    Raises:
        CacheCorrupt: There are tars, but no document from which their form is known.
    """
    root = damaged.root
    if damaged.manifest is None:
        if next(root.glob("passes/*/pixels"), None) and not (root / IMAGES_FILE).exists():
            return images_documents()  # the document has only one possible content
        if next(root.glob("passes/*/*.tar"), None) and not (root / FORM_FILE).exists():
            raise CacheCorrupt(
                f"{root}: neither {FORM_FILE} nor the manifest can be read, so it is not known"
                " which images the tars embed; put a copy of either back"
            )
        return {}
    forms = [images_documents(), *(TarForm(embed).documents() for embed in get_args(Embed))]
    return {
        path: content
        for documents in forms
        for path, content in documents.items()
        if damaged.manifest.files.get(path) == digest(content)
        and not damaged.cache.holds(path, content)
    }


def damaged_documents(damaged: DamagedCache) -> dict[str, bytes]:
    """Return plan and array metadata if they are damaged, with the right content."""
    cache, wanted = damaged.cache, {PLAN_FILE: canonical(damaged.plan)}
    for unit in damaged.units:
        wanted |= cache.documents(unit)
    return {path: content for path, content in wanted.items() if not cache.holds(path, content)}


def damaged_shards(damaged: DamagedCache) -> Iterator[ShardDamage]:
    """Yield every missing or damaged shard; reads the whole cache."""
    cache = damaged.cache
    for shard in cache.shards(damaged.num_passes):
        record = intact_record(damaged, shard)
        if record is None:
            yield ShardDamage(shard, None, tuple(cache.files(shard)))
            continue
        files = tuple(path for path, d in record.files.items() if not cache.holds(path, d))
        if files:
            yield ShardDamage(shard, record, files)


def intact_record(damaged: DamagedCache, shard: ShardId) -> ShardRecord | None:
    """Return the commit record of a shard, if it is intact and the manifest names it."""
    try:
        record = damaged.cache.record(shard)
    except CacheError:
        return None
    expected = damaged.record_hash_of(shard)
    return record if expected in (None, record_hash(record)) else None


def record_from_files(damaged: DamagedCache, shard: ShardId) -> ShardRecord | None:
    """Make a lost commit record from the shard's files; ``None`` unless the manifest names it."""
    if damaged.record_hash_of(shard) is None:
        return None
    for unit in damaged.units:
        # The shard of another unit has the same samples.
        other = intact_record(damaged, ShardId(unit, shard.number))
        if other is None:
            continue
        files: dict[str, FileDigest] = {}
        for relative in damaged.cache.files(shard, other.num_rows):
            try:
                files[relative] = digest_on_disk(inside(damaged.root, relative))
            except (CacheCorrupt, StoredFileError):
                return None
        record = other.model_copy(update={"unit": shard.unit, "files": files})
        return record_in_manifest(damaged, record)
    return None


def record_in_manifest(damaged: DamagedCache, record: ShardRecord) -> ShardRecord | None:
    """Return a record with the ``computed`` field that gives it the hash in the manifest.

    The manifest lists all values of the field, but not of which shards; ``None`` if no value gives
    the hash.
    """
    expected = damaged.record_hash_of(ShardId(record.unit, record.shard))
    listed = damaged.manifest.computed_otherwise if damaged.manifest else ()
    candidates = (record.model_copy(update={"computed": value}) for value in (None, *listed))
    return next((made for made in candidates if record_hash(made) == expected), None)


def write_file(root: Path, relative: str, content: bytes) -> None:
    """Write a file of the cache, replacing files, links and empty folders at its path.

    Raises:
        CacheCorrupt: There is a folder with files at the path.
    """
    path = root
    parts = PurePosixPath(relative).parts
    with explained(root / relative, "cannot write"):
        for part in parts[:-1]:
            path = path / part
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                path.unlink()
        path = path / parts[-1]
        if path.is_dir() and not path.is_symlink():
            if next(path.iterdir(), None) is not None:
                raise CacheCorrupt(f"{path}: is a folder with files, and must be a file")
            path.rmdir()
    commit_file(path, content)


def remove_damaged_manifest(damaged: DamagedCache) -> None:
    """Remove a damaged manifest, so that it can be made again."""
    path, manifest = damaged.root / MANIFEST_FILE, damaged.manifest
    if manifest is not None and damaged.cache.holds(MANIFEST_FILE, canonical(manifest)):
        return
    with explained(path, "cannot remove"):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def remove_unexpected(path: Path) -> None:
    """Remove a file or link that no document of the cache names."""
    with explained(path, "cannot remove"):
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder has other files
            path.parent.rmdir()
