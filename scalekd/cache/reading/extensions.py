"""Targets added to a cache under a name: more stages, another codec, another teacher.

An extension is a whole cache in ``extensions/NAME/``, with its own plan, records, codecs, tail and
manifest. It is written, verified and repaired like any other cache, and the files of the cache that
it extends do not change. Both have the same images, views and shards; the pixel hashes of every
shard are compared when it is read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np

from scalekd.cache.documents.manifest import Identity
from scalekd.cache.layout import EXTENSIONS_FOLDER, PLAN_FILE, SAMPLES, SEPARATOR, Layout
from scalekd.cache.reading.reader import CacheReader, SampleTable, open_cache
from scalekd.cache.writing.planning import differences
from scalekd.errors import CacheMismatch, UsageError
from scalekd.shapes import Rows
from scalekd.storage import Storage

BASE = "base"
"""Name that means the cache itself among the names of extensions."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_SHARED = ("data", "views", "skip_corrupt", "shard_size", "block_size")


def extension_path(name: str) -> str:
    """Return the folder of an extension inside the cache.

    Raises:
        UsageError: An extension cannot have this name.
    """
    if not is_extension_name(name):
        raise UsageError(
            f"{name!r} cannot name an extension; a name has letters, digits, '_', '-' and '.', and"
            f" {BASE!r} means the cache itself"
        )
    return f"{EXTENSIONS_FOLDER}/{name}"


def is_extension_name(name: str) -> bool:
    """Return whether an extension may have this name."""
    return _NAME.fullmatch(name) is not None and name != BASE


def extension_names(storage: Storage) -> list[str]:
    """Return the names of a cache's extensions, complete or not, in order."""
    return [name for name in storage.folders(EXTENSIONS_FOLDER) if is_extension_name(name)]


def begun_extensions(storage: Storage) -> list[str]:
    """Return the names of extensions that have a plan; none if the location cannot be listed."""
    try:
        names = extension_names(storage)
    except UsageError:
        return []
    return [name for name in names if storage.exists(f"{extension_path(name)}/{PLAN_FILE}")]


def open_extension(base: CacheReader, name: str) -> CacheReader:
    """Open an extension of a cache, and check that it fits.

    Raises:
        UsageError: The cache has no extension of that name.
        CacheError: The extension is incomplete, damaged, or belongs to another cache.
    """
    storage = base.storage
    inner = storage.below(extension_path(name))
    if not inner.exists(PLAN_FILE):
        try:
            known = f"its extensions: {', '.join(extension_names(storage)) or 'none'}"
        except UsageError:
            known = "this location cannot be listed"
        raise UsageError(f"{storage.location}: has no extension {name!r}; {known}")
    reader = open_cache(inner)
    check_fits(base.identity, reader.identity, where=reader.location)
    return reader


def check_fits(base: Identity, extension: Identity, *, where: str) -> None:
    """Check that an extension has the samples, views and shards of the cache it extends.

    Raises:
        CacheMismatch: They differ; the message names the difference.
    """
    shared = {name: getattr(base, name) for name in _SHARED}
    if any(getattr(extension, name) != value for name, value in shared.items()):
        raise CacheMismatch(
            f"{where}: is not an extension of the cache that contains it:"
            f" {differences(extension.model_copy(update=shared), extension)}"
        )


class JoinedReader:
    """Reads a cache together with extensions: the views of the cache, and the targets of all.

    It has the interface of :class:`~scalekd.cache.CacheReader` that loaders use. Arrays of an
    extension are named ``NAME:stage4/codes``.

    Args:
        base: The cache.
        extensions: Opened extensions by name; see :func:`open_extension`.

    Raises:
        CacheMismatch: An extension lacks shards that the cache contains.
        UsageError: Cache and extensions have no pass in common.
    """

    def __init__(self, base: CacheReader, extensions: Mapping[str, CacheReader]) -> None:
        self.base = base
        self.extensions = dict(extensions)
        self.location, self.identity = base.location, base.identity
        self.embed, self.policy = base.embed, base.policy
        self.is_remote = any(reader.is_remote for reader in (base, *extensions.values()))
        self._checked: set[tuple[int, int]] = set()
        views = list(base.layout.views)
        for name, reader in self.extensions.items():
            lacking = set(base.shards) - set(reader.shards)
            if lacking:
                raise CacheMismatch(
                    f"{reader.location}: lacks {len(lacking)} shards that the local part of the"
                    f" cache has, such as {min(lacking)}; fetch the same part of both"
                )
            views += (
                replace(array, name=f"{name}{SEPARATOR}{array.name}")
                for array in reader.layout.views
                if array.per_block
            )
        self.layout = Layout(base.identity, base.layout.samples, tuple(views), base.layout.form)
        if not self.passes:
            raise UsageError(
                f"{base.location}: the cache and the chosen extensions have no pass in common"
            )

    @property
    def samples(self) -> SampleTable:
        """See :attr:`CacheReader.samples`."""
        return self.base.samples

    @property
    def witnesses(self) -> Rows:
        """See :attr:`CacheReader.witnesses`."""
        return self.base.witnesses

    @cached_property
    def passes(self) -> tuple[int, ...]:
        """Passes that are complete in the cache and in all extensions."""
        common = set(self.base.passes)
        common.intersection_update(*(reader.passes for reader in self.extensions.values()))
        return tuple(sorted(common))

    def require(self, *groups: str) -> None:
        """See :meth:`CacheReader.require`; groups of an extension are named ``NAME:stage4``."""
        for group in groups:
            owner, _, inner = group.rpartition(SEPARATOR)
            (self.extensions[owner] if owner else self.base).require(inner)

    def blocks(self) -> list[tuple[int, int]]:
        """See :meth:`CacheReader.blocks`."""
        return self.base.blocks()

    def reopened(self) -> "JoinedReader":
        """Return a reader for another process; see :meth:`CacheReader.reopened`."""
        return JoinedReader(
            self.base.reopened(),
            {name: reader.reopened() for name, reader in self.extensions.items()},
        )

    def read_rows(
        self, pass_index: int, first: int, count: int, names: Iterable[str]
    ) -> dict[str, Rows]:
        """See :meth:`CacheReader.read_rows`.

        Raises:
            CacheMismatch: An extension contains other samples or other views than the cache.
        """
        by_owner: dict[str, list[str]] = {BASE: []}
        for name in names:
            owner, _, array = name.rpartition(SEPARATOR)
            by_owner.setdefault(owner or BASE, []).append(array)
        starts = self.samples.starts
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        self._check_shard(pass_index, shard)
        columns = self.base.read_rows(pass_index, first, count, by_owner.pop(BASE))
        for name, arrays in by_owner.items():
            reader = self.extensions[name]
            start = first - int(starts[shard]) + int(reader.samples.starts[shard])
            rows = reader.read_rows(pass_index, start, count, arrays)
            columns |= {f"{name}{SEPARATOR}{array}": column for array, column in rows.items()}
        return columns

    def _check_shard(self, pass_index: int, shard: int) -> None:
        """Compare samples and pixel hashes with the cache's, once for each shard of a pass."""
        if (pass_index, shard) in self._checked:
            return
        path = f"passes/{pass_index:04d}/pixel_hash"
        for name, reader in self.extensions.items():
            where = f"{reader.location}: shard {shard}"
            base = self.base.record(SAMPLES, shard)
            if reader.record(SAMPLES, shard).samples_sha256 != base.samples_sha256:
                raise CacheMismatch(f"{where} contains other samples than the cache it extends")
            ours = self.base.record(pass_index, shard).files
            theirs = reader.record(pass_index, shard).files
            hashes = {file for file in ours if file.startswith(path)}
            if hashes and all(ours[file] == theirs.get(file) for file in hashes):
                continue
            drawn = _hashes(self.base, pass_index, shard)
            if not np.array_equal(drawn, _hashes(reader, pass_index, shard)):
                raise CacheMismatch(
                    f"{where} of pass {pass_index} was made from other views than those of the"
                    f" cache it extends; delete extensions/{name} and write it again"
                )
        self._checked.add((pass_index, shard))


def _hashes(reader: CacheReader, pass_index: int, shard: int) -> Rows:
    starts = reader.samples.starts
    first, count = int(starts[shard]), int(starts[shard + 1] - starts[shard])
    return reader.read_rows(pass_index, first, count, ["pixel_hash"])["pixel_hash"]
