"""Passes as Zarr arrays: one file per block of each target, and per shard of each small array.

The samples of both forms are Zarr arrays, which :class:`ZarrArrays` reads.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from scalekd.cache.files import CommittedFiles
from scalekd.cache.forms.base import (
    Form,
    PassReader,
    ShardFiles,
    ShardTarget,
)
from scalekd.cache.forms.chunks import (
    MAX_METADATA_BYTES,
    check_metadata,
    decode_chunk,
    views_first,
)
from scalekd.cache.forms.images import images_documents
from scalekd.cache.forms.store import metadata_documents
from scalekd.cache.layout import SAMPLES, ArraySpec, Layout, Unit, array_path, chunk_path
from scalekd.cache.once import Once
from scalekd.errors import CacheCorrupt
from scalekd.shapes import Rows

if TYPE_CHECKING:
    from scalekd.cache.writing.rows import ViewRows

# Each has a few tens of kilobytes. A loader reads about 32 shards at a time, of about 8 arrays.
_KEPT_CHUNKS = 512


class ZarrArrays:
    """Reads rows of Zarr arrays; compares each chunk with its commit record; safe in threads.

    Args:
        files: Committed files of the cache, which include those of the shards that are read.
        layout: Layout of the cache.
    """

    def __init__(self, files: CommittedFiles, layout: Layout) -> None:
        self._files, self._layout = files, layout
        self._checked: Once[str, None] = Once()
        self._kept: Once[str, Rows] = Once(_KEPT_CHUNKS)

    def rows(self, unit: Unit, array: ArraySpec, start: int, count: int) -> Rows:
        """Return rows of one array, view axis first, as a new array.

        Raises:
            CacheCorrupt: A file is missing or is not the one committed.
        """
        step, end = array.rows_per_chunk(self._layout.identity), start + count
        parts = [np.empty((0, *array.shape_before, *array.shape_after), array.dtype)]
        for index in range(start // step, -(-end // step)):
            first = index * step
            rows = self._chunk(unit, array, index)[max(start - first, 0) : end - first]
            if count == step and rows.flags.c_contiguous and rows.flags.writeable:
                return rows
            parts.append(rows)
        return np.concatenate(parts)

    def _chunk(self, unit: Unit, array: ArraySpec, index: int) -> Rows:
        """Return a chunk. Chunks of a whole shard are kept, because all of its blocks need them."""
        if array.per_block or unit == SAMPLES:
            return self._decoded(unit, array, index)

        def make() -> Rows:
            rows = self._decoded(unit, array, index)
            rows.flags.writeable = False
            return rows

        return self._kept.get(chunk_path(unit, array, index), make)

    def _decoded(self, unit: Unit, array: ArraySpec, index: int) -> Rows:
        """Read and decode a chunk; return it with the view axis first."""
        identity, storage = self._layout.identity, self._files.storage
        metadata = f"{array_path(unit, array)}/zarr.json"

        def check() -> None:
            content = self._files.read(metadata, max_bytes=MAX_METADATA_BYTES)
            check_metadata(content, identity, array, storage.locate(metadata))

        self._checked.get(metadata, check)
        relative = chunk_path(unit, array, index)
        data = self._files.read(relative)
        try:
            rows = decode_chunk(data, array.compression, array.dtype, array.chunks(identity))
        except CacheCorrupt as error:
            # The bytes are the committed ones, so the writer committed an invalid array.
            raise CacheCorrupt(f"{storage.locate(relative)}: {error}") from None
        return views_first(rows, array.view_axis)


class _ZarrPasses(PassReader):
    """Reads the passes of a cache in Zarr form."""

    def __init__(self, files: CommittedFiles, layout: Layout) -> None:
        self._arrays, self._layout = ZarrArrays(files, layout), layout

    def read(
        self, pass_index: int, shard: int, num_rows: int, rows: range, names: Iterable[str]
    ) -> dict[str, Rows]:
        start = shard * self._layout.identity.shard_size + rows.start
        return {
            name: self._arrays.rows(pass_index, self._layout.find(name), start, len(rows))
            for name in names
        }


class _ZarrShard(ShardFiles):
    """Writes blocks of targets when they arrive, and the small arrays at the end."""

    def __init__(self, target: ShardTarget, pass_index: int, shard: int) -> None:
        self._target, self._pass = target, pass_index
        self._start = shard * target.layout.identity.shard_size

    def append(self, index: int, arrays: Mapping[str, Rows], rows: "ViewRows") -> None:
        self._write(arrays, self._start + index * self._target.layout.identity.block_size)

    def finish(self, rows: "ViewRows") -> None:
        self._write(rows.columns, self._start)

    def _write(self, arrays: Mapping[str, Rows], start: int) -> None:
        for name, rows in arrays.items():
            self._target.write(self._pass, self._target.layout.find(name), start, rows)


@dataclass(frozen=True)
class ZarrForm(Form):
    """Passes as Zarr arrays, with the views' pixels among them if they are embedded."""

    name: ClassVar[Literal["zarr", "webdataset"]] = "zarr"
    separates_targets: ClassVar[bool] = True
    embed: Literal["none", "pixels"] = "none"

    @property
    def summary(self) -> str | None:
        return None if self.embed == "none" else "Zarr arrays with the views' pixels"

    def documents(self) -> dict[str, bytes]:
        return {} if self.embed == "none" else images_documents()

    def pass_documents(self, layout: Layout, pass_index: int) -> dict[str, bytes]:
        return metadata_documents(layout.identity, pass_index, layout.views)

    def pass_files(self, layout: Layout, pass_index: int, shard: int, num_rows: int) -> list[str]:
        return layout.chunk_files(pass_index, shard, num_rows)

    def zarr_arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        return layout.views

    def part_of(self, relative: str, unit: object) -> str:
        return relative.split("/c/")[0].removeprefix(f"passes/{unit:0>4}/")

    def reader(self, files: CommittedFiles, layout: Layout) -> PassReader:
        return _ZarrPasses(files, layout)

    def shard_files(self, target: ShardTarget, pass_index: int, shard: int) -> ShardFiles:
        return _ZarrShard(target, pass_index, shard)

    def __str__(self) -> str:
        return "Zarr form" if self.embed == "none" else f"Zarr form with --embed {self.embed}"


ZARR = ZarrForm()
ZARR_PIXELS = ZarrForm("pixels")
