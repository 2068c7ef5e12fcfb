"""Zarr stores that commit what they write and check what they read.

zarr-python does all coding; these stores stand between it and the file system, because left
alone it answers a missing file with zeros and believes whatever bytes it finds.
"""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.buffer.core import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from scalekd.cache.files import FileDigest, commit_file, digest, inside, read_checked
from scalekd.cache.layout import ArraySpec, Unit, array_path, group_paths
from scalekd.cache.manifest import Identity
from scalekd.codecs import quiet_zarr
from scalekd.errors import CacheCorrupt

_METADATA = "zarr.json"
_CODECS = frozenset({"bytes", "transpose", "blosc", "zstd", "crc32c", "numcodecs.pcodec"})
"""Codecs format 1 may use. None of them runs code or opens a file."""


class CommittingStore(LocalStore):
    """Writes every file atomically and remembers its digest."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: dict[str, FileDigest] = {}
        self._lock = threading.Lock()

    async def set(self, key: str, value: Buffer) -> None:
        data = value.to_bytes()
        await asyncio.to_thread(commit_file, inside(self.root, key), data)
        with self._lock:
            self.written[key] = digest(data)


class CheckedStore(LocalStore):
    """Reads only files it has a digest for, whole, and refuses any that differ."""

    def __init__(self, root: Path, expected: dict[str, FileDigest]) -> None:
        super().__init__(root, read_only=True)
        self._expected = expected

    def expect(self, files: dict[str, FileDigest]) -> None:
        """Add files that a commit record names."""
        self._expected.update(files)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        if byte_range is not None:
            raise CacheCorrupt(f"{self.root / key}: format 1 reads whole files, never ranges")
        expected = self._expected.get(key)
        if expected is None:
            if key.rsplit("/", 1)[-1] in {".zarray", ".zattrs", ".zgroup", ".zmetadata"}:
                return None  # zarr looks for format 2 beside format 3
            raise CacheCorrupt(f"{self.root / key}: no commit record names this file")
        data = await asyncio.to_thread(read_checked, self.root, key, expected)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)


def metadata_documents(
    identity: Identity, unit: Unit, arrays: tuple[ArraySpec, ...]
) -> dict[str, bytes]:
    """The ``zarr.json`` documents of a unit, by path inside the cache."""
    memory: dict[str, Buffer] = {}
    store = MemoryStore(memory)
    for array in arrays:
        with quiet_zarr():
            zarr.create_array(
                store,
                name=array_path(unit, array),
                shape=array.shape(identity),
                chunks=array.chunks(identity),
                dtype=array.dtype,
                fill_value=0,
                dimension_names=[
                    *(f"before_{axis}" for axis in range(len(array.before))),
                    "view",
                    *(f"after_{axis}" for axis in range(len(array.after))),
                ],
                **array.codecs,
            )
    return {path: memory[path].to_bytes() for path in group_paths(unit, arrays)}


def open_array(
    store: LocalStore, identity: Identity, unit: Unit, array: ArraySpec
) -> zarr.Array[Any]:
    """Open an array of the cache and check that it is the array the plan describes.

    Raises:
        CacheCorrupt: Shape, type, chunks or codecs are not those of the plan.
    """
    path = array_path(unit, array)
    with quiet_zarr():
        opened = zarr.open_array(
            store,
            path=path,
            mode="r" if store.read_only else "r+",
            zarr_format=3,
        )
    # zarr leaves a chunk of zeros unwritten, and open_array ignores the setting that forbids it:
    # a shard of class 0 alone would have no file of labels.
    opened = opened.with_config({"write_empty_chunks": True})
    found = (opened.shape, opened.chunks, opened.dtype)
    expected = (array.shape(identity), array.chunks(identity), array.dtype)
    if found != expected:
        raise CacheCorrupt(
            f"{store.root / path}: shape, chunks and type are {found}; the plan says {expected}"
        )
    codecs = {str(codec["name"]) for codec in opened.metadata.to_dict()["codecs"]}  # type: ignore[union-attr,index,call-overload]
    if not codecs <= _CODECS:
        raise CacheCorrupt(
            f"{store.root / path}: coded with {sorted(codecs - _CODECS)}, not a codec of format 1"
        )
    return opened


def write_rows(
    opened: zarr.Array[Any], array: ArraySpec, start: int, rows: np.ndarray[Any, Any], span: int
) -> None:
    """Write rows from ``start`` on, padded with zeros to ``span`` rows: whole chunks, once each."""
    axis = array.view_axis
    missing = span - rows.shape[axis]
    if missing:
        padding = [(0, 0)] * rows.ndim
        padding[axis] = (0, missing)
        rows = np.pad(rows, padding)
    opened[(slice(None),) * axis + (slice(start, start + span),)] = rows
