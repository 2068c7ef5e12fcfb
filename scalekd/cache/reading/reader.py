"""Reading a cache: every file is compared with its committed digest before it is used.

Opening reads the manifest, the plan and the codec tables; targets are read one block at a time. A
reader keeps no file open, so it may be pickled or forked into the workers of a loader, and several
threads may read blocks of one pass at the same time.
"""

import copy
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from scalekd.cache.cache import Cache, read_manifest_if_any
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Manifest, ShardRecord
from scalekd.cache.documents.records import record_hash, samples_hash
from scalekd.cache.files import (
    CommittedFiles,
    FileDigest,
    digest,
    read_again_if_corrupt,
    read_checked,
)
from scalekd.cache.forms import Embed, ZarrArrays
from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE, SAMPLES, ShardId, Unit
from scalekd.cache.once import Once
from scalekd.cache.tables import check_table, load_witnesses, table_files
from scalekd.codecs.compression import FREE_EXPANSION_BYTES
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError, UsageError
from scalekd.shapes import Rows
from scalekd.storage import Location, open_storage
from scalekd.views import ViewPolicy

# A sample has a hash of 8 bytes, which does not compress, and a key of at most 4,096 bytes.
_MAX_SAMPLES_EXPANSION = 1024


def check_folder(location: Location) -> None:
    """Raise ``DataError`` if ``location`` is a local folder that does not exist."""
    storage = open_storage(location)
    if storage.root is not None and not storage.root.is_dir():
        raise DataError(f"no cache at {storage.location}: there is no such folder")


def read_manifest(location: Location) -> Manifest:
    """Read the manifest of a complete cache.

    Raises:
        DataError: The location does not contain a cache.
        CacheCorrupt: The cache is incomplete, or its manifest is damaged.
        CacheMismatch: Another version of the format wrote the cache.
    """
    storage = open_storage(location)
    check_folder(storage)
    manifest = read_manifest_if_any(storage)
    if manifest is None and storage.exists(PLAN_FILE):
        raise CacheCorrupt(
            f"{storage.location}: the cache is not complete (no {MANIFEST_FILE}); run the same"
            " `scalekd cache-teacher` again to finish it, or the same `scalekd cache pull` if it is"
            " a copy"
        )
    if manifest is None:
        raise DataError(
            f"no cache at {storage.location}: it contains neither {MANIFEST_FILE} nor {PLAN_FILE}"
        )
    return manifest


def open_cache(location: Location) -> "CacheReader":
    """Open a complete cache; reads its manifest and codec tables.

    Args:
        location: Folder or URL (``s3://…``, ``https://…``) of the cache, or either opened with
            :func:`scalekd.storage.open_storage`.

    Raises:
        DataError, CacheCorrupt, CacheMismatch: As for :func:`read_manifest`.
    """
    storage = open_storage(location)
    manifest = read_manifest(storage)
    reader = CacheReader(Cache(storage, manifest.plan), manifest)
    reader.file(PLAN_FILE, digest(canonical(manifest.plan)))
    return reader


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of a cache in order, without those skipped as corrupt.

    Attributes:
        keys: Keys in UTF-8, as NumPy byte strings of fixed width.
        labels: Class of each sample, or -1.
        source_hashes: xxh3-64 of each encoded image.
        starts: Number of the first sample of each shard, and at the end the number of samples.
    """

    keys: Rows
    labels: Rows
    source_hashes: Rows
    starts: Rows

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        """Return the key of a sample."""
        return bytes(self.keys[sample]).decode()


class CacheReader:
    """A complete cache, or a partial copy of one, opened for reading.

    Every method that reads raises ``CacheCorrupt`` if a file is not the committed one.

    Attributes:
        cache: The cache.
        part: Part of the cache at this location.
        storage: Storage of the cache.
        location: Location of the cache, for messages.
        is_remote: Whether files are read over a network.
        manifest: Manifest of the cache.
        identity: Identity of the cache: everything that decides its bytes.
        codecs: Codecs of the targets.
        layout: Arrays of the cache.
        embed: Kind of images that the cache embeds.
        policy: Policy that drew the views.
        num_passes: Number of passes of the whole cache.
        passes: Numbers of the passes at this location.
        shards: Numbers of the shards at this location.

    Args:
        cache: The cache.
        manifest: Manifest of the cache; see :func:`read_manifest`.
    """

    def __init__(self, cache: Cache, manifest: Manifest) -> None:
        self.cache = cache
        self.part = cache.selection
        self.storage = cache.storage
        self.location = cache.location
        self.is_remote = cache.storage.is_remote
        self.manifest = manifest
        self.identity = identity = cache.identity
        self.codecs = cache.codecs
        self.layout = cache.layout
        self.embed: Embed = cache.form.embed
        self.policy = ViewPolicy.from_config(identity.views.policy)
        self.num_passes = manifest.num_passes
        self.passes = tuple(filter(self.part.has_unit, range(self.num_passes)))
        self.shards = tuple(filter(self.part.has_shard, range(identity.num_shards)))
        self._open_units()

    def _open_units(self) -> None:
        self._lock = threading.Lock()
        self._of_samples = _OpenUnit(self, SAMPLES)
        self._of_pass = self._of_samples

    def __getstate__(self) -> dict[str, Any]:
        opened = {"_lock", "_of_samples", "_of_pass"}
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_units()

    def reopened(self) -> "CacheReader":
        """Return a reader for another process; the two share only the table of samples."""
        _ = self.samples
        return copy.copy(self)

    def require(self, *groups: str) -> None:
        """Check that groups of targets, such as ``stage4``, or the ``tail`` are at this location.

        Raises:
            UsageError: The location contains a part of the cache without them.
        """
        for group in groups:
            has = self.part.has_tail if group == "tail" else self.part.has_target(group)
            if not has:
                raise UsageError(
                    f"{self.location}: contains only {self.part}, not {group}; fetch it with"
                    f" `scalekd cache pull SOURCE {self.location}` and the options that select it"
                )

    def file(self, relative: str | None, expected: FileDigest | None) -> bytes:
        """Read a file that the plan names, such as the tail, and check its digest and content.

        Raises:
            UsageError: The cache was written without this file.
            CacheCorrupt: The file changed since it was committed, or is of another kind.
        """
        if relative is None or expected is None:
            raise UsageError(f"{self.location}: the cache was written without this file")
        if self.manifest.files.get(relative) != expected:
            raise CacheCorrupt(f"{self.location}: the manifest and the plan disagree on {relative}")
        if relative == self.identity.tail:
            self.require("tail")
        content = read_checked(self.storage, relative, expected)
        if relative in table_files(self.identity):
            check_table(self.identity, relative, content, self.storage.locate(relative))
        return content

    def record(self, unit: Unit, shard: int) -> ShardRecord:
        """Return the commit record of a shard, checked against the manifest."""
        return self._unit(unit).record(shard)

    def _unit(self, unit: Unit) -> "_OpenUnit":
        """Return the opened samples or pass; only one pass is kept in memory."""
        if unit == SAMPLES:
            return self._of_samples
        with self._lock:
            if self._of_pass.unit != unit:
                self._of_pass = _OpenUnit(self, unit)
            return self._of_pass

    def read_record(self, unit: Unit, shard: int) -> ShardRecord:
        """Read the commit record of a shard again; see :meth:`record`."""
        path = ShardId(unit, shard).record_path
        sha256 = self.manifest.records.get(path)

        def read() -> ShardRecord:
            record = self.cache.record(ShardId(unit, shard), sha256=sha256)
            if record_hash(record) != sha256:
                raise CacheCorrupt(
                    f"{self.storage.locate(path)}: not the record that the manifest was written for"
                )
            return record

        return read_again_if_corrupt(self.storage, path, sha256, read)

    @cached_property
    def samples(self) -> SampleTable:
        """Samples of the shards at this location; read once."""
        parts: dict[str, list[Rows]] = {array.name: [] for array in self.layout.samples}
        counts, num_bytes, num_stored = [], 0, 0
        if not self.shards:
            raise CacheCorrupt(
                f"{self.location}: a part ({self.part}) without a shard of the cache, which has"
                f" {self.identity.num_shards:,}; fetch it again with `scalekd cache pull`"
            )
        for shard in range(self.identity.num_shards):
            if not self.part.has_shard(shard):
                counts.append(0)
                continue
            record = self.record(SAMPLES, shard)
            counts.append(record.num_rows)
            start = shard * self.identity.shard_size
            num_bytes += record.num_rows * sum(a.bytes_per_view for a in self.layout.samples)
            num_stored += sum(entry.num_bytes for entry in record.files.values())
            if num_bytes > max(FREE_EXPANSION_BYTES, _MAX_SAMPLES_EXPANSION * num_stored):
                raise CacheCorrupt(
                    f"{self.location}: the table of samples would take {num_bytes:,} bytes, and its"
                    f" files up to shard {shard} have {num_stored:,}"
                )
            for array in self.layout.samples:
                rows = self._of_samples.arrays.rows(SAMPLES, array, start, record.num_rows)
                parts[array.name].append(rows)
            keys, labels, hashes = (parts[name][-1] for name in ("key", "label", "source_hash"))
            try:
                names = [bytes(key).decode() for key in _as_strings(keys)]
            except UnicodeDecodeError as error:
                raise CacheCorrupt(
                    f"{self.location}: a key of shard {shard} is not UTF-8 ({error})"
                ) from None
            if samples_hash(names, labels, hashes) != record.samples_sha256:
                raise CacheCorrupt(
                    f"{self.location}: the table of shard {shard} has other samples, or another"
                    " order, than its commit record"
                )
        return SampleTable(
            _as_strings(np.concatenate(parts["key"])),
            np.concatenate(parts["label"]),
            np.concatenate(parts["source_hash"]),
            np.cumsum([0, *counts]),
        )

    @cached_property
    def witnesses(self) -> Rows:
        """Pixels of the first samples' views in pass 0, ``(view, height, width, 3)`` uint8.

        They measure the drift of a machine that does not redraw views exactly. Empty in a part
        without the first samples.
        """
        views = self.identity.views
        content = self.file(views.witnesses, views.witnesses_digest)
        pixels = load_witnesses(self.identity, content, self.storage.locate(views.witnesses))
        lacking = next(
            (s for s in range(self.identity.num_shards) if not self.part.has_shard(s)), None
        )
        if lacking is not None and self.samples.starts[lacking] < len(pixels):
            return pixels[:0]
        return pixels

    def blocks(self) -> list[tuple[int, int]]:
        """Return ``(first sample, number of samples)`` of each block, in order, for all passes."""
        blocks = []
        starts = self.samples.starts.tolist()
        for first, end in pairwise(starts):
            rows = end - first
            for offset in range(0, rows, self.identity.block_size):
                blocks.append((first + offset, min(self.identity.block_size, rows - offset)))
        return blocks

    def read_rows(
        self, pass_index: int, first: int, count: int, names: Iterable[str]
    ) -> dict[str, Rows]:
        """Read rows of one block, or of several blocks of one shard.

        Args:
            pass_index: Number of the pass.
            first: Number of the first sample, as in :class:`SampleTable`.
            count: Number of rows, all in one shard.
            names: Arrays to read, such as ``stage4/codes`` or ``pixel_hash``; also
                :data:`~scalekd.cache.forms.IMAGE` if encoded images are embedded.

        Returns:
            Array by name, view axis first.

        Raises:
            CacheCorrupt: A file is missing or is not the committed one.
            UsageError: The location contains a part of the cache without these rows.
        """
        names = tuple(names)
        starts = self.samples.starts
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        if first + count > starts[shard + 1]:
            raise ValueError(f"rows {first} to {first + count} lie in more than one shard")
        if not 0 <= pass_index < self.num_passes:
            raise CacheMismatch(
                f"{self.location}: pass {pass_index} was requested, the cache has {self.num_passes}"
            )
        if not self.part.has_unit(pass_index):
            raise UsageError(f"{self.location}: contains only {self.part}, not pass {pass_index}")
        self.require(*{name.split("/")[0] for name in names})
        record = self.record(pass_index, shard)
        if record.samples_sha256 != self.record(SAMPLES, shard).samples_sha256:
            raise CacheCorrupt(
                f"{self.location}: shard {shard} of pass {pass_index} contains other samples than"
                " the cache's table of samples"
            )
        row = first - int(starts[shard])
        rows = range(row, row + count)
        reader = self._unit(pass_index).reader
        return reader.read(pass_index, shard, record.num_rows, rows, names)

    def image_ranges(self, pass_index: int, shard: int) -> tuple[str, Rows]:
        """Return the path of a shard's tar, and the image of each view in it.

        Returns:
            Path, and int64 ``(view, 2)``: offset and size in bytes of each image.

        Raises:
            UsageError: The cache embeds no images.
        """
        num_rows = self.record(pass_index, shard).num_rows
        ranges = self._unit(pass_index).reader.image_ranges(pass_index, shard, num_rows)
        if ranges is None or self.embed == "none":
            raise UsageError(f"{self.location}: contains no images; pass --data-dir")
        return ranges


class _OpenUnit:
    """What a reader keeps of the samples or of one pass: records, decoded arrays, indexes."""

    def __init__(self, reader: CacheReader, unit: Unit) -> None:
        self.unit = unit
        self._read = reader.read_record
        self._records: Once[int, ShardRecord] = Once()
        self._files = CommittedFiles(reader.storage, dict(reader.manifest.files))
        self.arrays = ZarrArrays(self._files, reader.layout)
        self.reader = reader.layout.form.reader(self._files, reader.layout)

    def record(self, shard: int) -> ShardRecord:
        """Return the commit record of a shard, whose files may be read from then on."""

        def read() -> ShardRecord:
            record = self._read(self.unit, shard)
            self._files.expect(record.files)
            return record

        return self._records.get(shard, read)


def _as_strings(rows: Rows) -> Rows:
    """Return rows of zero-padded UTF-8 bytes as NumPy byte strings."""
    rows = np.ascontiguousarray(rows)
    return rows.view(f"S{rows.shape[1]}")[:, 0]
