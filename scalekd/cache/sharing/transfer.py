"""Copy a cache, or a part of one, between storage locations, shard by shard.

The digest of a file is checked after reading and after writing. A shard's record is written after
its files, and the manifest is written last. Every file is written once, so transfers to the same
target may run at the same time, and an interrupted transfer continues with the missing files. Only
committed shards are copied, so the source may still be growing.
"""

import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from scalekd.cache.documents import MAX_JSON_BYTES, canonical
from scalekd.cache.documents.manifest import Manifest, Plan, ShardRecord
from scalekd.cache.documents.records import record_hash
from scalekd.cache.documents.selection import Selection
from scalekd.cache.documents.stored import read_document
from scalekd.cache.files import (
    FileDigest,
    digest,
    file_problem,
    holds,
    read_checked,
)
from scalekd.cache.forms.images import IMAGES_FILE
from scalekd.cache.forms.webdataset.form import FORM_FILE
from scalekd.cache.layout import (
    COMPANIONS,
    MANIFEST_FILE,
    PLAN_FILE,
    SELECTION_FOLDER,
    ShardId,
)
from scalekd.cache.sharing.source import SourceCache
from scalekd.cache.tables import check_table, table_files
from scalekd.cache.writing.planning import begin_form, differences
from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.storage import NotStored, Storage
from scalekd.storage.files import inside

_BEFORE_THE_PLAN = re.compile(
    rf"{SELECTION_FOLDER}/|\.|(?:"
    rf"{'|'.join(map(re.escape, (*COMPANIONS, FORM_FILE, IMAGES_FILE)))})$"
)
"""Paths that may exist before the plan is written: selection, card, form, hidden files."""


@dataclass
class Tally:
    """Counts of a transfer.

    Attributes:
        num_files: Number of copied files.
        num_bytes: Total size of the copied files.
        num_shards: Number of examined shards, of samples and passes.
        num_found: Number of examined shards that were already at the target.
    """

    num_files: int = 0
    num_bytes: int = 0
    num_shards: int = 0
    num_found: int = 0


class Transfer:
    """Copies a cache from one storage location to another.

    Args:
        source: Cache to copy from.
        target: Storage to copy to.
        plan: Plan to write at the target, of the same cache; the source's when ``None``.
        jobs: Number of files to copy at the same time; all of them are in memory.
        check: Read the existing files of the target, and replace those that differ.
        read_back: Read every file back from a remote target, and check its digest.
        link: Between folders, make hard links where the file system supports them.
        tally: Counts to add to; new ones when ``None``.
    """

    def __init__(
        self,
        source: SourceCache,
        target: Storage,
        *,
        plan: Plan | None = None,
        jobs: int = 8,
        check: bool = False,
        read_back: bool = True,
        link: bool = False,
        tally: Tally | None = None,
    ) -> None:
        self._source, self._target = source, target
        self._plan = plan or source.plan
        self._jobs, self._check, self._link = jobs, check, link
        self._read_back = read_back and target.is_remote
        self._tables = table_files(source.plan.identity)
        self._lock = threading.Lock()
        self._existing: dict[str, int] = {}
        self.tally = tally or Tally()

    def prepare(self) -> None:
        """Begin the cache at the target, or check that the existing one is the same cache.

        Raises:
            CacheMismatch: The target contains another cache.
            UsageError: The target contains other files, or is not writable.
        """
        target, plan = self._target, self._plan
        self._existing = {stored.path: stored.size for stored in target.list()}
        unexpected = [path for path in sorted(self._existing) if not _BEFORE_THE_PLAN.match(path)]
        if unexpected and PLAN_FILE not in self._existing:
            raise UsageError(
                f"{target.location} contains files that are not part of a cache ({unexpected[0]});"
                " choose an empty or new location"
            )
        begin_form(target, self._source.form, advice="choose another location")
        if target.commit(PLAN_FILE, canonical(plan), exclusive=True):
            return
        existing = read_document(target, PLAN_FILE, Plan, "the plan")
        if existing.cache_id != plan.cache_id:
            raise CacheMismatch(
                f"{target.location} contains another cache than {self._source.storage.location}:"
                f" {differences(existing.identity, plan.identity)}"
            )
        if existing != plan:
            raise CacheMismatch(
                f"{target.locate(PLAN_FILE)}: the same job was begun separately: licence, note,"
                f" software or measured errors differ from those at"
                f" {self._source.storage.location}; join the two caches with `scalekd cache merge`"
            )

    def copy(self, selection: Selection, advanced: Callable[[], None]) -> None:
        """Copy the committed shards of a selection; :meth:`finish` writes the manifest.

        Args:
            selection: Part of the cache to copy.
            advanced: Called after each shard.

        Raises:
            CacheCorrupt: A file of the source is damaged, or was damaged in transit.
            CacheMismatch: A shard was committed at the target with other bytes.
        """
        source = self._source
        shards = source.selected(selection)
        # A store that commits many files together commits the shards one after another.
        num_shards = 1 if self._target.commits_together else self._jobs
        with (
            ThreadPoolExecutor(self._jobs, thread_name_prefix="transfer-file") as files,
            ThreadPoolExecutor(num_shards, thread_name_prefix="transfer-shard") as work,
        ):
            self._copy_files(self._common_files(selection), files)

            def copy_shard(shard: ShardId) -> None:
                self._copy_shard(source.record(shard), shard, selection, files)

            pending = [work.submit(copy_shard, shard) for shard in shards]
            try:
                for done in as_completed(pending):
                    done.result()
                    advanced()
            except BaseException:
                for future in pending:
                    future.cancel()
                raise

    def finish(self) -> bool:
        """Write the manifest, unless the target's manifest has as many passes or more.

        Returns:
            Whether the target is complete; ``False`` if the source is not complete.
        """
        ours = self._source.manifest_at_opening
        while ours is not None:
            if self._target.commit(MANIFEST_FILE, canonical(ours), exclusive=True):
                return True
            where = self._target.locate(MANIFEST_FILE)
            theirs = read_document(self._target, MANIFEST_FILE, Manifest, "the manifest")
            if any(
                theirs.records.get(path, hash_) != hash_ for path, hash_ in ours.records.items()
            ):
                raise CacheMismatch(
                    f"{where}: its records differ from those in the manifest of the source"
                )
            if theirs.num_passes >= ours.num_passes:
                return True
            self._target.commit(MANIFEST_FILE, canonical(ours))
        return self._target.exists(MANIFEST_FILE)

    def _common_files(self, selection: Selection) -> dict[str, FileDigest | bytes]:
        """Return tables and array metadata, as digests or as content derived from the plan."""
        source, identity = self._source, self._source.identity
        common: dict[str, FileDigest | bytes] = {**table_files(identity)}
        if source.manifest_at_opening is not None:
            source.check_names(source.manifest_at_opening)
            common |= source.manifest_at_opening.files
        else:
            common |= source.layout.form.documents()
            for unit in {shard.unit for shard in source.selected(selection)}:
                common |= source.documents(unit)
        if identity.tail is not None and not selection.has_tail:
            common.pop(identity.tail, None)
        common.pop(PLAN_FILE, None)
        return {path: content for path, content in common.items() if selection.has_file(path)}

    def _copy_shard(
        self,
        record: ShardRecord,
        shard: ShardId,
        selection: Selection,
        files: ThreadPoolExecutor,
    ) -> None:
        source, path = self._source, shard.record_path
        manifest = source.manifest_at_opening
        if manifest is not None and manifest.records.get(path) != record_hash(record):
            raise CacheCorrupt(
                f"{source.storage.locate(path)}: not the record that the manifest was written for"
            )
        content = canonical(record)
        is_committed = path in self._existing and self._has_record(path, content)
        wanted = {file: d for file, d in record.files.items() if selection.has_file(file)}
        if self._target.commits_together and not is_committed:
            num_copied = self._copy_files({**wanted, path: content}, files)
        else:
            num_copied = self._copy_files(wanted, files, is_ours=is_committed)
        if not is_committed and not self._target.commit(path, content, exclusive=True):
            self._has_record(path, content)
        with self._lock:
            self._existing[path] = len(content)
            self.tally.num_shards += 1
            self.tally.num_found += is_committed and not num_copied

    def _has_record(self, path: str, content: bytes) -> bool:
        """Return whether the target has a record; raise ``CacheMismatch`` if it has another one."""
        try:
            existing = self._target.read(path, max_bytes=MAX_JSON_BYTES)
        except NotStored:
            return False  # the listing was out of date
        if existing != content:
            raise CacheMismatch(
                f"{self._target.locate(path)}: this shard has other bytes than at"
                f" {self._source.storage.location}: two jobs wrote this cache on machines that"
                " round differently; choose another location"
            )
        return True

    def _copy_files(
        self,
        wanted: Mapping[str, FileDigest | bytes],
        files: ThreadPoolExecutor,
        *,
        is_ours: bool = False,
    ) -> int:
        """Copy files in parallel; return the number copied, or raise the first error."""
        if self._target.commits_together:
            return self._copy_together(wanted, files, replace=is_ours or self._check)
        pending = [
            files.submit(self._copy_file, path, content, is_ours=is_ours)
            for path, content in wanted.items()
        ]
        try:
            return sum(future.result() for future in pending)
        except BaseException:
            for future in pending:
                future.cancel()
            raise

    def _copy_together(
        self, wanted: Mapping[str, FileDigest | bytes], files: ThreadPoolExecutor, *, replace: bool
    ) -> int:
        """Copy files in commits of many files, in order; all files are held in memory."""
        expected = {p: digest(f) if isinstance(f, bytes) else f for p, f in wanted.items()}
        missing = [path for path in wanted if not self._is_present(path, expected[path])]

        def content(path: str) -> bytes:
            file = wanted[path]
            return file if isinstance(file, bytes) else self._read(path, file)

        data = dict(zip(missing, files.map(content, missing), strict=True))
        made = self._target.commit_all(data, exclusive=not replace) if data else set()
        unsure = missing if self._read_back else [path for path in missing if path not in made]
        differing = files.map(lambda path: not holds(self._target, path, expected[path]), unsure)
        for path, differs in zip(unsure, differing, strict=True):
            if differs:
                self._raise_difference(path, made=path in made)
        for path in missing:
            self._count(path, expected[path].num_bytes)
        return len(missing)

    def _copy_file(self, path: str, wanted: FileDigest | bytes, *, is_ours: bool) -> bool:
        """Copy one file unless it is present; return whether it was copied.

        ``is_ours``: The target's record names these bytes, so a file with other bytes is replaced.
        """
        expected = digest(wanted) if isinstance(wanted, bytes) else wanted
        if self._is_present(path, expected):
            return False
        made = self._put(path, wanted, expected, replace=is_ours or self._check)
        if (self._read_back or not made) and not holds(self._target, path, expected):
            self._raise_difference(path, made=made)
        self._count(path, expected.num_bytes)
        return True

    def _is_present(self, path: str, expected: FileDigest) -> bool:
        """Return whether the target has a file: of this size, or with ``check`` of this digest."""
        if self._existing.get(path) != expected.num_bytes:
            return False
        return not self._check or holds(self._target, path, expected)

    def _count(self, path: str, num_bytes: int) -> None:
        with self._lock:
            self._existing[path] = num_bytes
            self.tally.num_files += 1
            self.tally.num_bytes += num_bytes

    def _raise_difference(self, path: str, *, made: bool) -> NoReturn:
        where = self._target.locate(path)
        if made:
            raise CacheCorrupt(
                f"{where}: was damaged in transit; run the same command again with --check"
            )
        raise CacheMismatch(
            f"{where}: its bytes differ from the source's, and no commit record at the target names"
            " either (of an interrupted copy, or another job); pass --check to replace it"
        )

    def _put(
        self, path: str, wanted: FileDigest | bytes, expected: FileDigest, *, replace: bool
    ) -> bool:
        """Write a file; return whether it was written. ``replace`` overwrites an existing file."""
        source, target = self._source.storage, self._target
        if isinstance(wanted, bytes):
            return target.commit(path, wanted, exclusive=not replace)
        may_link = self._link and not replace and path not in self._tables
        if may_link and source.root is not None and target.root is not None:
            problem = file_problem(source, path, expected)
            if problem is not None:
                raise CacheCorrupt(f"{source.locate(path)}: {problem}")
            made = _linked(inside(source.root, path), inside(target.root, path))
            if made is not None:
                return made
        return target.commit(path, self._read(path, expected), exclusive=not replace)

    def _read(self, path: str, expected: FileDigest) -> bytes:
        """Read a file of the source; tables are validated before they are written anywhere."""
        source = self._source.storage
        content = read_checked(source, path, expected)
        if path in self._tables:
            check_table(self._source.plan.identity, path, content, source.locate(path))
        return content


def _linked(source: Path, target: Path) -> bool | None:
    """Make a hard link; return whether it was made, ``None`` if links are not supported."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:
        return None  # another file system, or one without links
    return True
