"""The intact parts of a damaged cache, and what must be written again.

Plan and manifest contain the same plan, records are made from files and named by the manifest, so
most documents can be made again from the others. The pipeline writes the rest again, and compares
it with the documents that are intact before it replaces a file.
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
from scalekd.cache.files import FileDigest, digest, digest_on_disk, holds
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
from scalekd.storage import LocalStorage
from scalekd.storage.files import commit_file, explained, inside


@dataclass(frozen=True)
class Standing:
    """The intact documents of a cache.

    Attributes:
        cache: The cache, with the plan that most commit records name.
        manifest: The manifest if it is intact; otherwise it is made again from the records.
        num_passes: Number of passes that the cache must have.
    """

    cache: Cache
    manifest: Manifest | None
    num_passes: int

    @property
    def plan(self) -> Plan:
        return self.cache.plan

    @property
    def units(self) -> tuple[Unit, ...]:
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


def believed(root: Path) -> Standing:
    """Read plan and manifest; if they differ, choose the one that more commit records name.

    Raises:
        DataError: ``root`` does not contain a cache.
        CacheCorrupt: Neither can be read, so the content of the cache is not known.
        CacheMismatch: They are of a later version of the format.
    """
    check_folder(root)
    manifest, plan = None, None
    why: list[str] = []
    try:
        manifest = read_manifest(root)
    except (CacheError, DataError) as error:
        why.append(str(error))
    try:
        plan = read_plan(root)
    except (CacheError, UsageError) as error:
        why.append(str(error))
    if manifest is None and plan is None:
        manifest = _manifest_as_plan(root)  # the two may have changed places
    if manifest is not None and (plan is None or not _outvoted(root, manifest.plan, plan)):
        cache = Cache(root, manifest.plan)
        return Standing(cache, manifest, max(manifest.num_passes, _complete(cache)))
    if plan is not None:
        return Standing(Cache(root, plan), None, max(1, _begun(root)))
    if not (root / RECORDS_FOLDER).is_dir():
        raise DataError(f"no cache at {root}: it holds no plan, no manifest and no records")
    raise CacheCorrupt(
        f"{root}: neither plan nor manifest can be read, so nothing says what the cache is to"
        f" hold; put a copy of either back, or write the cache again ({'; '.join(why)})"
    )


def _manifest_as_plan(root: Path) -> Manifest | None:
    try:
        manifest = read_document(LocalStorage(root), PLAN_FILE, Manifest, "the plan")
    except CacheError:
        return None
    return manifest if manifest.digest else None


def _outvoted(root: Path, plan: Plan, other: Plan) -> bool:
    """Whether more commit records name the ``other`` cache."""
    owners = _owners(root)
    return owners[other.cache_id] > owners[plan.cache_id]


def _owners(root: Path) -> Counter[str]:
    """Count the commit records of each cache."""
    found: Counter[str] = Counter()
    for path in (root / RECORDS_FOLDER).glob("*/*.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES:
                found[str(json.loads(path.read_bytes())["cache_id"])] += 1
    return found


def _complete(cache: Cache) -> int:
    """Return the number of passes, from the first on, of which every shard is committed."""
    number = 0
    while all(cache.has(ShardId(number, shard)) for shard in range(cache.identity.num_shards)):
        number += 1
    return number


def _begun(root: Path) -> int:
    """Return the number of passes, from the first on, of which any file exists."""
    number = 0
    while any(
        next(folder.rglob("*.json"), None) is not None
        for folder in (root / f"{RECORDS_FOLDER}/{number:04d}", root / f"passes/{number:04d}")
    ):
        number += 1
    return number


def damaged_form(root: Path, standing: Standing) -> dict[str, bytes]:
    """The form documents that are not as they must be, with what they must hold.

    Raises:
        CacheCorrupt: There are tars, and nothing tells what they embed; or pixels, and no document
            that declares them.
    """
    if standing.manifest is None:
        if next(root.glob("passes/*/pixels"), None) and not (root / IMAGES_FILE).exists():
            return images_documents()  # only one content is possible
        if next(root.glob("passes/*/*.tar"), None) and not (root / FORM_FILE).exists():
            raise CacheCorrupt(
                f"{root}: neither {FORM_FILE} nor the manifest can be read, so nothing says what"
                " the tars embed; put a copy of either back"
            )
        return {}
    made = [images_documents(), *(TarForm(embed).documents() for embed in get_args(Embed))]
    return {
        path: content
        for documents in made
        for path, content in documents.items()
        if standing.manifest.files.get(path) == digest(content)
        and not holds(LocalStorage(root), path, content)
    }


def damaged_documents(standing: Standing) -> dict[str, bytes]:
    """Return the damaged plan and array metadata, with the right content."""
    cache, wanted = standing.cache, {PLAN_FILE: canonical(standing.plan)}
    for unit in standing.units:
        wanted |= cache.documents(unit)
    return {path: content for path, content in wanted.items() if not cache.holds(path, content)}


def damaged_shards(standing: Standing) -> Iterator[ShardDamage]:
    """Yield every missing or damaged shard; reads the whole cache."""
    cache = standing.cache
    for shard in cache.shards(standing.num_passes):
        record = sound_record(standing, shard)
        if record is None:
            yield ShardDamage(shard, None, tuple(cache.files(shard)))
            continue
        files = tuple(path for path, d in record.files.items() if not cache.holds(path, d))
        if files:
            yield ShardDamage(shard, record, files)


def sound_record(standing: Standing, shard: ShardId) -> ShardRecord | None:
    """Return the commit record of a shard, if it is intact and named by the manifest."""
    try:
        record = standing.cache.record(shard)
    except CacheError:
        return None
    expected = standing.record_hash_of(shard)
    return record if expected in (None, record_hash(record)) else None


def record_from_files(root: Path, standing: Standing, shard: ShardId) -> ShardRecord | None:
    """Make a lost commit record from the shard's files; ``None`` unless the manifest names it."""
    expected = standing.record_hash_of(shard)
    if expected is None:
        return None
    for other in standing.units:
        twin = sound_record(standing, ShardId(other, shard.number))
        if twin is None:
            continue
        files: dict[str, FileDigest] = {}
        for relative in standing.cache.files(shard, twin.num_rows):
            try:
                path = inside(root, relative)
            except CacheCorrupt:
                return None
            if not path.is_file():
                return None
            files[relative] = digest_on_disk(path)
        made = twin.model_copy(update={"unit": shard.unit, "files": files})
        return proven(standing, made)
    return None


def proven(standing: Standing, record: ShardRecord) -> ShardRecord | None:
    """The record that the manifest was written for: this one, however it was computed.

    A lost record said how its shard was computed if it was not as the plan says; the manifest has
    kept in what other ways shards were computed, but not which.
    """
    expected = standing.record_hash_of(ShardId(record.unit, record.shard))
    ways = standing.manifest.computed_otherwise if standing.manifest else ()
    for computed in (None, *ways):
        made = record.model_copy(update={"computed": computed})
        if record_hash(made) == expected:
            return made
    return None


def put(root: Path, relative: str, content: bytes) -> None:
    """Write a file of the cache, over whatever stands in its way but a folder with content.

    Raises:
        CacheCorrupt: Folders that are not the cache's stand where the file belongs.
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
                raise CacheCorrupt(f"{path}: a folder with files stands where a file belongs")
            path.rmdir()
    commit_file(path, content)


def drop_manifest(root: Path, standing: Standing) -> None:
    """Remove a damaged manifest, so that it can be made again."""
    path, manifest = root / MANIFEST_FILE, standing.manifest
    if manifest is not None and standing.cache.holds(MANIFEST_FILE, canonical(manifest)):
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
        with contextlib.suppress(OSError):  # the folder holds something else
            path.parent.rmdir()
