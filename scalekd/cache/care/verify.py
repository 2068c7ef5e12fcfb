"""Verify a cache: every file is named by a document and has the committed size and bytes."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scalekd.cache.cache import Cache
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Manifest, ShardRecord
from scalekd.cache.documents.records import record_hash
from scalekd.cache.documents.selection import Selection
from scalekd.cache.files import FileDigest, file_problem
from scalekd.cache.layout import (
    COMPANIONS,
    DIFFERENCES,
    EXTENSIONS_FOLDER,
    LEASE_SUFFIX,
    MANIFEST_FILE,
    PLAN_FILE,
    RECORDS_FOLDER,
    SAMPLES,
    SELECTION_FOLDER,
    ShardId,
)
from scalekd.cache.reading.extensions import check_fits, extension_names, extension_path
from scalekd.cache.reading.reader import CacheReader, open_cache, read_manifest
from scalekd.cache.tables import table_files
from scalekd.cache.writing.finishing import manifest_of
from scalekd.cache.writing.planning import read_plan
from scalekd.errors import CacheError, UsageError
from scalekd.storage import Location, Storage, open_storage
from scalekd.storage.files import TEMPORARY_SUFFIX
from scalekd.views import pixel_hash, undo_differences

_OF_WRITERS = frozenset({TEMPORARY_SUFFIX, LEASE_SUFFIX})
_CHECKED_ELSEWHERE = re.compile(
    rf"{EXTENSIONS_FOLDER}/[^/]+/|{SELECTION_FOLDER}/\d{{6}}\.json$"
    rf"|(?:{'|'.join(map(re.escape, COMPANIONS))})$"
)
"""Extensions, which are verified as caches, and selections, which are checked when read."""
_FOLDERS_OF_SHARDS = frozenset({RECORDS_FOLDER, SAMPLES, "passes"})
_LATER_PASS = re.compile(r"(?:passes|records)/(\d{4})/")


class Findings:
    """Result of a verification.

    Attributes:
        problems: One sentence for each problem; empty for an intact cache.
        damaged: Shards that must be written again.
        unexpected: Files and links that no document names.
        num_files: Number of files checked.
        num_bytes: Total size of the files whose bytes were checked.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.damaged: set[ShardId] = set()
        self.unexpected: list[Path] = []
        self.num_files = 0
        self.num_bytes = 0

    def add(self, problem: str, shard: ShardId | None = None) -> None:
        """Add a problem, and the shard that it damages."""
        self.problems.append(problem)
        if shard is not None:
            self.damaged.add(shard)


def verify(location: Location, *, quick: bool = False) -> Findings:
    """Check every file of a complete cache.

    Args:
        location: Location of the cache; see :func:`~scalekd.cache.reading.reader.open_cache`.
        quick: Check records and sizes without reading data.

    Raises:
        DataError: There is no cache at ``location``.
        CacheError: The manifest is damaged, so that the other files cannot be checked.
    """
    storage = open_storage(location)
    manifest = read_manifest(storage)
    cache = Cache(storage, manifest.plan)
    part = cache.selection
    findings = Findings()
    known = {MANIFEST_FILE, *manifest.files}
    _check_documents(storage, manifest, findings)
    for relative, expected in manifest.files.items():
        if part.has_file(relative) and (relative != manifest.plan.identity.tail or part.has_tail):
            _check_file(storage, relative, expected, quick, findings, None)
    try:
        cache.check_names(manifest)
    except CacheError as error:
        if not findings.problems:
            raise
        findings.add(f"shards were not checked: {error}")
        return findings
    for shard, record in _records(cache, manifest, findings):
        for relative, expected in record.files.items():
            known.add(relative)
            if part.has_file(relative):
                _check_file(storage, relative, expected, quick, findings, shard)
    known |= set(manifest.records)
    if storage.root is not None:
        _check_unexpected(storage.root, known, manifest, part, findings)
    if part.is_all:
        _check_age(cache, manifest, findings)
    if not findings.problems and not quick:
        _check_rows(storage, findings)
    _check_extensions(storage, manifest, quick, findings)
    return findings


def _check_extensions(
    storage: Storage, manifest: Manifest, quick: bool, findings: Findings
) -> None:
    """Verify each complete extension as a cache, and check that it has the views of the cache."""
    try:
        names = extension_names(storage)
    except UsageError:
        return  # the files of a web server cannot be listed
    for name in names:
        inner = storage.below(extension_path(name))
        if not inner.exists(MANIFEST_FILE):
            continue
        try:
            own = verify(inner, quick=quick)
            check_fits(
                manifest.plan.identity, read_manifest(inner).plan.identity, where=inner.location
            )
        except CacheError as error:
            findings.add(str(error))
            continue
        findings.problems += own.problems
        findings.num_files += own.num_files
        findings.num_bytes += own.num_bytes


def _check_unexpected(
    root: Path, known: set[str], manifest: Manifest, part: Selection, findings: Findings
) -> None:
    for path in unexpected_files(root, known, manifest.num_passes):
        if not part.is_all and path.relative_to(root).parts[0] in _FOLDERS_OF_SHARDS:
            continue  # files of an interrupted pull
        findings.unexpected.append(path)
        findings.add(
            f"{path}: a symbolic link; a cache contains plain files only"
            if path.is_symlink()
            else f"{path}: no record names this file"
        )


def _check_documents(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """Check that manifest and plan belong to the same cache."""
    path = storage.locate(MANIFEST_FILE)
    for relative, expected in table_files(manifest.plan.identity).items():
        if manifest.files.get(relative) != expected:
            findings.add(f"{path}: its digest of {relative} differs from the one in its plan")
    try:
        plan = read_plan(storage)
    except (CacheError, UsageError):
        return  # reported with the other files
    if plan is not None and plan.cache_id != manifest.plan.cache_id:
        findings.add(
            f"{path} belongs to cache {manifest.plan.cache_id[:12]}…, and"
            f" {storage.locate(PLAN_FILE)} to cache {plan.cache_id[:12]}…: files of two caches were"
            " mixed"
        )


def _check_age(cache: Cache, manifest: Manifest, findings: Findings) -> None:
    """Report a stale manifest, in which a complete pass is missing."""
    later = manifest.num_passes
    if all(cache.has(ShardId(later, number)) for number in range(cache.identity.num_shards)):
        findings.add(
            f"{cache.storage.locate(MANIFEST_FILE)}: stale: pass {later} is complete and not in it;"
            " run `scalekd cache repair`"
        )


def _records(
    cache: Cache, manifest: Manifest, findings: Findings
) -> Iterator[tuple[ShardId, ShardRecord]]:
    part, all_shards = cache.selection, list(cache.shards(manifest.num_passes))
    for shard in all_shards:
        if not part.has_unit(shard.unit) or not part.has_shard(shard.number):
            continue
        try:
            record = cache.record(shard)
        except CacheError as error:
            findings.add(str(error), shard)
            continue
        findings.num_files += 1
        findings.num_bytes += len(canonical(record))
        if record_hash(record) != manifest.records.get(shard.record_path):
            path = cache.storage.locate(shard.record_path)
            findings.add(f"{path}: not the record that the manifest was written for", shard)
        yield shard, record
    if {shard.record_path for shard in all_shards} != set(manifest.records):
        findings.add(f"{cache.storage.locate(MANIFEST_FILE)}: names other shards than the plan has")


def _check_file(
    storage: Storage,
    relative: str,
    expected: FileDigest,
    quick: bool,
    findings: Findings,
    shard: ShardId | None,
) -> None:
    try:
        problem = file_problem(storage, relative, expected, quick=quick)
    except CacheError as error:
        problem = str(error)
    findings.num_files += 1
    findings.num_bytes += 0 if quick else expected.num_bytes
    if problem is not None:
        where = "" if shard is None else f" ({shard})"
        findings.add(f"{storage.locate(relative)}{where}: {problem}", shard)


def unexpected_files(root: Path, known: set[str], num_passes: int) -> Iterator[Path]:
    """Yield files and links that no document names.

    Temporary files of interrupted writers and repairs are ignored, and also later passes than the
    manifest's, which are being added.
    """
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if relative.parts[0].endswith(TEMPORARY_SUFFIX):
            continue
        if _CHECKED_ELSEWHERE.match(relative.as_posix()):
            continue
        if path.is_symlink():
            yield path
        elif path.is_file() and str(relative) not in known and path.suffix not in _OF_WRITERS:
            later = _LATER_PASS.match(relative.as_posix())
            if not later or int(later[1]) < num_passes:
                yield path


def _check_pixels(reader: CacheReader, findings: Findings) -> None:
    """Compare all embedded pixels with their hashes; a loader compares only some of them."""
    if reader.embed != "pixels":
        return
    import torch

    starts = reader.samples.starts
    for pass_index in reader.passes:
        for first, count in reader.blocks():
            try:
                rows = reader.read_rows(pass_index, first, count, [DIFFERENCES, "pixel_hash"])
            except CacheError as error:
                findings.add(str(error))
                return
            planes = undo_differences(torch.from_numpy(rows[DIFFERENCES]))
            pixels = planes.permute(0, 2, 3, 1).contiguous().numpy()
            hashes = np.array([pixel_hash(view) for view in pixels], np.uint64)
            wrong = int((hashes != rows["pixel_hash"]).sum())
            shard = ShardId(pass_index, int(np.searchsorted(starts, first, side="right")) - 1)
            if wrong:
                findings.add(
                    f"{reader.location}: {shard}: the pixels of {wrong} views in samples {first} to"
                    f" {first + count - 1} do not have their pixel hash",
                    shard,
                )


def _check_rows(storage: Storage, findings: Findings) -> None:
    """Check that array metadata, keys, tables and embedded pixels agree with the records."""
    reader = open_cache(storage)
    try:
        _ = reader.samples
        for relative, expected in table_files(reader.identity).items():
            if relative != reader.identity.tail or reader.part.has_tail:
                reader.file(relative, expected)
    except CacheError as error:
        findings.add(str(error))
        return
    for pass_index in reader.passes:
        for number in reader.shards:
            shard = ShardId(pass_index, number)
            table = reader.record(SAMPLES, number).samples_sha256
            if reader.record(pass_index, number).samples_sha256 != table:
                findings.add(
                    f"{storage.location}: {shard} contains other samples than the table", shard
                )
    _check_pixels(reader, findings)
    if findings.problems or not reader.part.is_all:
        return
    made = manifest_of(reader.cache, reader.num_passes)
    for name in Manifest.model_fields:
        if name != "digest" and getattr(made, name) != getattr(reader.manifest, name):
            findings.add(
                f"{storage.locate(MANIFEST_FILE)}: {name} does not follow from the records: it was"
                " edited"
            )
