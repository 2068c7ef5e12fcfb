"""Write arrays with zarr-python; every file is committed atomically.

:mod:`scalekd.cache.forms.chunks` reads them.
"""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from scalekd.cache.documents.manifest import Identity
from scalekd.cache.files import FileDigest, digest, digest_on_disk, read_bounded
from scalekd.cache.forms.chunks import MAX_METADATA_BYTES, check_metadata
from scalekd.cache.layout import ArraySpec, Layout, Unit, array_path, group_paths
from scalekd.codecs import quiet_zarr
from scalekd.storage import LocalStorage
from scalekd.storage.files import commit_file, inside


class CommittingStore(LocalStore):
    """Writes every file atomically and remembers its digest.

    Args:
        root: Folder of the cache.
        check: Called with a file's path immediately before the file is put in place; raises unless
            this process may still write it.

    Attributes:
        folder: The same folder, to read from.
        written: Digest of each file that was written, by path.
    """

    def __init__(self, root: Path, *, check: Callable[[str], None] | None = None) -> None:
        super().__init__(root)
        self.folder = LocalStorage(root)
        self.written: dict[str, FileDigest] = {}
        self._check = check
        self._lock = threading.Lock()

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.put, key, value.to_bytes())

    def put(self, relative: str, data: bytes | memoryview) -> None:
        """Commit a file that does not belong to Zarr, and record its digest."""
        path, content = inside(self.root, relative), digest(data)
        if self._check is None:
            commit_file(path, data)
        else:
            check = partial(self._check, relative)
            # Another process may have written the file while this one was suspended. `check` allows
            # replacing it if this process has the lease again and no record exists.
            made = commit_file(path, data, exclusive=True, check=check)
            if not made and digest_on_disk(path) != content:
                commit_file(path, data, check=check)
        with self._lock:
            self.written[relative] = content


def metadata_documents(
    identity: Identity, unit: Unit, arrays: tuple[ArraySpec, ...]
) -> dict[str, bytes]:
    """Return the ``zarr.json`` documents of the samples or of a pass, by path."""
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
                    *(f"before_{axis}" for axis in range(len(array.shape_before))),
                    "view",
                    *(f"after_{axis}" for axis in range(len(array.shape_after))),
                ],
                **array.zarr_kwargs(),
            )
    return {path: memory[path].to_bytes() for path in group_paths(unit, arrays)}


def unit_documents(layout: Layout, unit: Unit) -> dict[str, bytes]:
    """Return the documents that describe the arrays of the samples or of a pass, by path."""
    if isinstance(unit, int):
        return layout.form.pass_documents(layout, unit)
    return metadata_documents(layout.identity, unit, layout.samples)


def open_array(
    store: CommittingStore, identity: Identity, unit: Unit, array: ArraySpec
) -> zarr.Array[Any]:
    """Open an array for writing, after comparing its metadata with the plan.

    Raises:
        CacheCorrupt: The metadata differ from the plan.
    """
    path = f"{array_path(unit, array)}/zarr.json"
    content = read_bounded(
        store.folder, path, max_bytes=MAX_METADATA_BYTES, what="the metadata of an array"
    )
    check_metadata(content, identity, array, store.folder.locate(path))
    with quiet_zarr():
        opened = zarr.open_array(store, path=array_path(unit, array), mode="r+", zarr_format=3)
    # By default zarr writes no chunk of zeros, and open_array has no option for it: a shard with
    # only class 0 would have no file of labels.
    return opened.with_config({"write_empty_chunks": True})


def write_rows(
    opened: zarr.Array[Any], array: ArraySpec, start: int, rows: np.ndarray[Any, Any], span: int
) -> None:
    """Write rows from ``start`` on, padded with zeros to ``span`` rows, which are whole chunks."""
    axis = array.view_axis
    missing = span - rows.shape[axis]
    if missing:
        padding = [(0, 0)] * rows.ndim
        padding[axis] = (0, missing)
        rows = np.pad(rows, padding)
    opened[(slice(None),) * axis + (slice(start, start + span),)] = rows
