"""From one place to another: a cache, or a part of it, shard by shard, each file checked twice.

A file is held against its digest when it was read and when it has arrived; a shard's record is
written when its files stand, the manifest last. All are written once, so transfers to the same
place may run at the same time, and what was interrupted goes on with what is missing. What nobody
has committed is never taken, so the source may still be growing.
"""

import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from scalekd.cache.documents import MAX_JSON_BYTES, canonical, parse_committed
from scalekd.cache.files import (
    FileDigest,
    digest,
    file_problem,
    holds,
    read_bounded,
    read_checked,
)
from scalekd.cache.forms import read_form
from scalekd.cache.forms.webdataset.form import FORM_FILE
from scalekd.cache.layout import (
    COMPANIONS,
    MANIFEST_FILE,
    PLAN_FILE,
    SELECTION_FOLDER,
    ShardId,
)
from scalekd.cache.manifest import Manifest, Plan, ShardRecord
from scalekd.cache.planning import differences
from scalekd.cache.records import record_hash
from scalekd.cache.selection import Selection
from scalekd.cache.source import SourceCache
from scalekd.cache.tables import check_table, table_files
from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.storage import NotStored, Storage
from scalekd.storage.files import inside

_MAY_PRECEDE = re.compile(
    rf"{SELECTION_FOLDER}/|(?:{'|'.join(map(re.escape, (*COMPANIONS, FORM_FILE)))})$|\."
)
"""What may stand where a cache is begun: selection, dataset card, form, hidden files."""


@dataclass
class Tally:
    """What a transfer did.

    Attributes:
        num_files: Files brought.
        num_bytes: Their bytes.
        num_shards: Shards looked at, of samples and passes.
        num_found: Of these, those that stood already.
    """

    num_files: int = 0
    num_bytes: int = 0
    num_shards: int = 0
    num_found: int = 0


class Transfer:
    """Brings a cache from one place to another.

    Args:
        source: What to bring.
        target: Where to.
        plan: The plan the target is to have, when not the source's: of the same cache.
        jobs: Files in flight at once, each in memory.
        check: Read what already stands at the target, and bring what differs again.
        read_back: Read every file back from a remote target, and hold it against its digest.
        link: From folder to folder, make hard links where the file system can.
        tally: Where to count; of its own when not given.
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
        self._standing: dict[str, int] = {}
        self.tally = tally or Tally()

    def prepare(self) -> None:
        """Begin the target, or see that it is the same cache.

        Raises:
            CacheMismatch: Another cache stands there.
            UsageError: Something that is no cache stands there, or it cannot be written to.
        """
        target, plan = self._target, self._plan
        self._standing = {stored.path: stored.size for stored in target.list()}
        strangers = [path for path in sorted(self._standing) if not _MAY_PRECEDE.match(path)]
        if strangers and PLAN_FILE not in self._standing:
            raise UsageError(
                f"{target.place} holds something that is no cache ({strangers[0]}); choose an empty"
                " or new place"
            )
        form = self._source.form
        for relative, content in form.documents().items():
            if PLAN_FILE not in self._standing:
                target.commit(relative, content, exclusive=True)
        begun = target.commit(PLAN_FILE, canonical(plan), exclusive=True)
        standing_form = read_form(target)
        if standing_form != form:
            raise CacheMismatch(
                f"{target.place} holds a cache in {standing_form}, and"
                f" {self._source.storage.place} is in {form}; choose another place"
            )
        if begun:
            return
        data = read_bounded(target, PLAN_FILE, max_bytes=MAX_JSON_BYTES, what="the plan")
        standing = parse_committed(Plan, data, where=target.locate(PLAN_FILE))
        if standing.cache_id != plan.cache_id:
            raise CacheMismatch(
                f"{target.place}: another cache stands there than at {self._source.storage.place}:"
                f" {differences(standing.identity, plan.identity)}"
            )
        if standing != plan:
            raise CacheMismatch(
                f"{target.locate(PLAN_FILE)}: the same job, begun apart: licence, note, software or"
                f" measured errors differ from those at {self._source.storage.place}; join the two"
                " with `scalekd cache merge`"
            )

    def bring(self, selection: Selection, advanced: Callable[[], None]) -> None:
        """Bring what is committed of a selection; the manifest is left to :meth:`seal`.

        Args:
            selection: What to bring.
            advanced: Called when a shard stands at the target.

        Raises:
            CacheCorrupt: A file of the source is damaged, or did not arrive as it was sent.
            CacheMismatch: Other bytes were committed at the target.
        """
        source = self._source
        shards = source.selected(selection)
        # A store that commits together commits one shard after another.
        num_shards = 1 if self._target.commits_together else self._jobs
        with (
            ThreadPoolExecutor(self._jobs, thread_name_prefix="transfer-file") as files,
            ThreadPoolExecutor(num_shards, thread_name_prefix="transfer-shard") as work,
        ):
            self._bring_files(self._common_files(selection), files)

            def bring_shard(shard: ShardId) -> None:
                self._bring_shard(source.record(shard), shard, selection, files)

            pending = [work.submit(bring_shard, shard) for shard in shards]
            try:
                for done in as_completed(pending):
                    done.result()
                    advanced()
            except BaseException:
                for future in pending:
                    future.cancel()
                raise

    def seal(self) -> bool:
        """Write the manifest, unless the target's tells of as many passes or more.

        Returns:
            Whether the target is complete now; it is not when the source is not.
        """
        ours = self._source.at_opening
        while ours is not None:
            if self._target.commit(MANIFEST_FILE, canonical(ours), exclusive=True):
                return True
            where = self._target.locate(MANIFEST_FILE)
            data = read_bounded(
                self._target, MANIFEST_FILE, max_bytes=MAX_JSON_BYTES, what="the manifest"
            )
            theirs = parse_committed(Manifest, data, where=where)
            if any(
                theirs.records.get(path, hash_) != hash_ for path, hash_ in ours.records.items()
            ):
                raise CacheMismatch(
                    f"{where}: tells of other shards than the manifest at the source"
                )
            if theirs.num_passes >= ours.num_passes:
                return True
            self._target.commit(MANIFEST_FILE, canonical(ours))
        return self._target.exists(MANIFEST_FILE)

    def _common_files(self, selection: Selection) -> dict[str, FileDigest | bytes]:
        """Tables and array metadata: with their digests, or as the plan makes them."""
        source, identity = self._source, self._source.identity
        common: dict[str, FileDigest | bytes] = {**table_files(identity)}
        if source.at_opening is not None:
            source.check_names(source.at_opening)
            common |= source.at_opening.files
        else:
            common |= source.layout.form.documents()
            for unit in {shard.unit for shard in source.selected(selection)}:
                common |= source.documents(unit)
        if identity.tail is not None and not selection.has_tail:
            common.pop(identity.tail, None)
        common.pop(PLAN_FILE, None)
        return {path: content for path, content in common.items() if selection.has_file(path)}

    def _bring_shard(
        self,
        record: ShardRecord,
        shard: ShardId,
        selection: Selection,
        files: ThreadPoolExecutor,
    ) -> None:
        source, path = self._source, shard.record_path
        manifest = source.at_opening
        if manifest is not None and manifest.records.get(path) != record_hash(record):
            raise CacheCorrupt(
                f"{source.storage.locate(path)}: not the record that the manifest was written for"
            )
        content = canonical(record)
        stands = path in self._standing and self._holds_record(path, content)
        wanted = {file: found for file, found in record.files.items() if selection.has_file(file)}
        if self._target.commits_together and not stands:
            num_brought = self._bring_files({**wanted, path: content}, files)
        else:
            num_brought = self._bring_files(wanted, files, is_ours=stands)
        if not stands and not self._target.commit(path, content, exclusive=True):
            self._holds_record(path, content)
        with self._lock:
            self._standing[path] = len(content)
            self.tally.num_shards += 1
            self.tally.num_found += stands and not num_brought

    def _holds_record(self, path: str, content: bytes) -> bool:
        """Whether a record stands at the target; raises when it is another."""
        try:
            found = self._target.read(path, max_bytes=MAX_JSON_BYTES)
        except NotStored:
            return False  # the listing was out of date
        if found != content:
            raise CacheMismatch(
                f"{self._target.locate(path)}: this shard was committed there with other bytes than"
                f" at {self._source.storage.place}: two jobs wrote this cache on machines that do"
                " not compute alike; choose another place"
            )
        return True

    def _bring_files(
        self,
        wanted: Mapping[str, FileDigest | bytes],
        files: ThreadPoolExecutor,
        *,
        is_ours: bool = False,
    ) -> int:
        """Bring files in parallel; returns the number brought. Reports the first error."""
        if self._target.commits_together:
            return self._bring_together(wanted, files, replace=is_ours or self._check)
        pending = [
            files.submit(self._bring_file, path, found, is_ours=is_ours)
            for path, found in wanted.items()
        ]
        try:
            return sum(future.result() for future in pending)
        except BaseException:
            for future in pending:
                future.cancel()
            raise

    def _bring_together(
        self, wanted: Mapping[str, FileDigest | bytes], files: ThreadPoolExecutor, *, replace: bool
    ) -> int:
        """Bring files in commits of many, in order; all of them are in memory meanwhile."""
        expected = {p: digest(f) if isinstance(f, bytes) else f for p, f in wanted.items()}
        missing = [path for path in wanted if not self._stands(path, expected[path])]

        def content(path: str) -> bytes:
            found = wanted[path]
            if isinstance(found, bytes):
                return found
            return self._read(path, found)

        data = dict(zip(missing, files.map(content, missing), strict=True))
        made = self._target.commit_all(data, exclusive=not replace) if data else set()
        unsure = missing if self._read_back else [path for path in missing if path not in made]
        differing = files.map(lambda path: not holds(self._target, path, expected[path]), unsure)
        for path, differs in zip(unsure, differing, strict=True):
            if differs:
                self._refuse(path, made=path in made)
        for path in missing:
            self._arrived(path, expected[path].num_bytes)
        return len(missing)

    def _bring_file(self, path: str, wanted: FileDigest | bytes, *, is_ours: bool) -> bool:
        """Bring one file unless it stands; ``is_ours``: its record does, and names these bytes."""
        expected = digest(wanted) if isinstance(wanted, bytes) else wanted
        if self._stands(path, expected):
            return False
        made = self._put(path, wanted, expected, replace=is_ours or self._check)
        if (self._read_back or not made) and not holds(self._target, path, expected):
            self._refuse(path, made=made)
        self._arrived(path, expected.num_bytes)
        return True

    def _stands(self, path: str, expected: FileDigest) -> bool:
        """Whether a file need not be brought."""
        if self._standing.get(path) != expected.num_bytes:
            return False
        return not self._check or holds(self._target, path, expected)

    def _arrived(self, path: str, num_bytes: int) -> None:
        with self._lock:
            self._standing[path] = num_bytes
            self.tally.num_files += 1
            self.tally.num_bytes += num_bytes

    def _refuse(self, path: str, *, made: bool) -> NoReturn:
        where = self._target.locate(path)
        if made:
            raise CacheCorrupt(
                f"{where}: did not arrive as it was sent; run the same command again with --check"
            )
        raise CacheMismatch(
            f"{where}: holds other bytes than are to come, and no commit record there says which"
            " are right: an interrupted copy, or another job's; pass --check to replace it"
        )

    def _put(
        self, path: str, wanted: FileDigest | bytes, expected: FileDigest, *, replace: bool
    ) -> bool:
        """Whether the file was made; ``replace`` makes it whatever stands there."""
        source, target = self._source.storage, self._target
        if isinstance(wanted, bytes):
            return target.commit(path, wanted, exclusive=not replace)
        may_link = self._link and not replace and path not in self._tables
        if may_link and source.root is not None and target.root is not None:
            problem = file_problem(source, path, expected)
            if problem is not None:
                raise CacheCorrupt(f"{source.locate(path)}: {problem}")
            found = _linked(inside(source.root, path), inside(target.root, path))
            if found is not None:
                return found
        return target.commit(path, self._read(path, expected), exclusive=not replace)

    def _read(self, path: str, expected: FileDigest) -> bytes:
        """A file of the source; a table is parsed before it may be written anywhere."""
        source = self._source.storage
        content = read_checked(source, path, expected)
        if path in self._tables:
            check_table(self._source.plan.identity, path, content, source.locate(path))
        return content


def _linked(source: Path, target: Path) -> bool | None:
    """Whether a hard link was made; ``None`` where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:
        return None  # another file system, or one without links
    return True
