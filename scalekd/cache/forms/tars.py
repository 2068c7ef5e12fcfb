"""Passes as WebDataset tars: one tar and its index per shard, all values of a view together.

:mod:`scalekd.cache.forms.webdataset` has the format of the tars.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from scalekd.cache.documents import canonical
from scalekd.cache.files import CommittedFiles
from scalekd.cache.forms.base import (
    HAS_IMAGES,
    Form,
    PassReader,
    ShardFiles,
    ShardTarget,
)
from scalekd.cache.forms.webdataset.blocks import TarBlock, make_block
from scalekd.cache.forms.webdataset.form import (
    FIELDS_FILE,
    FORM_FILE,
    INFO_FILE,
    PackedFields,
    WebDatasetForm,
    index_path,
    info_document,
    tar_path,
)
from scalekd.cache.forms.webdataset.packing import SOURCE_HASH, ViewPacking
from scalekd.cache.forms.webdataset.reader import TarReader
from scalekd.cache.forms.webdataset.shard_file import TarShardFile
from scalekd.cache.layout import ArraySpec, Layout
from scalekd.options import Embed
from scalekd.shapes import Rows

if TYPE_CHECKING:
    from scalekd.cache.writing.rows import ViewRows

# A member of a tar has a header of 512 bytes and is padded to a multiple of 512, with half of that
# on average. A view has a member for its label (one block), one for its fields, and one for its
# image if images are embedded.
_VIEW_BYTES = 2 * 512 + 512 + 256
_IMAGE_BYTES = 512 + 256


class _TarShard(ShardFiles):
    """Appends blocks to a tar in their order; blocks that arrive early wait in memory."""

    def __init__(self, target: ShardTarget, pass_index: int, shard: int) -> None:
        self._target, self._pass, self._shard = target, pass_index, shard
        self._packing = ViewPacking(target.layout.views)
        self._tar = TarShardFile(target.root)  # on the disk of the cache, which has room for it
        self._lock = threading.Lock()
        self._waiting: dict[int, TarBlock] = {}
        self._next = 0

    def append(self, index: int, arrays: Mapping[str, Rows], rows: "ViewRows") -> None:
        block = self._block(arrays, rows)
        with self._lock:
            self._waiting[index] = block
            while self._next in self._waiting:
                self._tar.append(self._waiting.pop(self._next))
                self._next += 1

    def finish(self, rows: "ViewRows") -> None:
        if not self._next:
            self._tar.discard()
            return
        tar, index = self._tar.close()
        self._target.put(tar_path(self._pass, self._shard), tar)
        self._target.put(index_path(self._pass, self._shard), index.to_bytes())

    def discard(self) -> None:
        self._tar.discard()

    def _block(self, arrays: Mapping[str, Rows], rows: "ViewRows") -> TarBlock:
        layout, samples = self._target.layout, rows.samples
        planes = {name: layout.find(name).views_first(stored) for name, stored in arrays.items()}
        packed = self._packing.pack({**planes, **rows.columns, SOURCE_HASH: samples.source_hashes})
        return make_block(samples.keys, samples.labels, packed, rows.images)


@dataclass(frozen=True)
class TarForm(Form):
    """Passes as tars in WebDataset's layout."""

    name: ClassVar[Literal["zarr", "webdataset"]] = "webdataset"
    separates_targets: ClassVar[bool] = False
    embed: Embed

    @property
    def overhead_bytes(self) -> int:
        return _VIEW_BYTES + _IMAGE_BYTES * (self.embed in HAS_IMAGES)

    @property
    def summary(self) -> str:
        contents = {
            "none": "no images",
            "source": "the images",
            "view": "the views' images",
            "pixels": "the views' pixels",
        }
        return f"WebDataset tars with {contents[self.embed]}"

    def documents(self) -> dict[str, bytes]:
        return {FORM_FILE: canonical(WebDatasetForm.of(self.embed))}

    def pass_documents(self, layout: Layout, pass_index: int) -> dict[str, bytes]:
        return {FIELDS_FILE: canonical(PackedFields(fields=ViewPacking(layout.views).fields))}

    def final_documents(self, rows_of: Callable[[int], int], num_shards: int) -> dict[str, bytes]:
        if self.embed not in HAS_IMAGES:
            return {}
        return {INFO_FILE: info_document({shard: rows_of(shard) for shard in range(num_shards)})}

    def pass_files(self, layout: Layout, pass_index: int, shard: int, num_rows: int) -> list[str]:
        return [tar_path(pass_index, shard), index_path(pass_index, shard)] if num_rows else []

    def zarr_arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        return ()

    def part_of(self, relative: str, unit: object) -> str:
        return "tars" if relative.endswith(".tar") else "indexes"

    def reader(self, files: CommittedFiles, layout: Layout) -> PassReader:
        return TarReader(files, layout)

    def shard_files(self, target: ShardTarget, pass_index: int, shard: int) -> ShardFiles:
        return _TarShard(target, pass_index, shard)

    def __str__(self) -> str:
        return f"WebDataset form with --embed {self.embed}"
