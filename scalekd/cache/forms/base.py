"""What the two forms of a cache have in common: the interface that everything else speaks to.

The passes of a cache are stored as Zarr arrays or as tars; its samples are Zarr arrays in either
form. Nothing outside this package asks which form a cache has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from scalekd.cache.files import CommittedFiles
from scalekd.options import Embed

if TYPE_CHECKING:
    from scalekd.cache.layout import ArraySpec, Layout, Unit
    from scalekd.cache.writing.rows import ViewRows

Rows = np.ndarray[Any, Any]

RENDERED: tuple[Embed, ...] = ("view", "pixels")
"""Kinds that give the pixels that the teacher saw, and no other size."""

HAS_IMAGES: tuple[Embed, ...] = ("source", "view")
"""Kinds with an encoded image for each view, in a member of a tar."""

IMAGE = "image"
"""Name under which a block's embedded images are asked for: an array of ``bytes`` objects."""


class ShardTarget(Protocol):
    """What a shard's files are written through: the cache's writer."""

    root: Path
    layout: "Layout"

    def put(self, relative: str, data: bytes | memoryview) -> None:
        """Commit a file of a claimed shard."""

    def write(self, unit: "Unit", array: "ArraySpec", start: int, rows: Rows) -> None:
        """Write rows of a Zarr array, padded to whole chunks."""


class ShardFiles(ABC):
    """The files of one shard of a pass while they are written; blocks may come in any order."""

    @abstractmethod
    def append(self, index: int, arrays: Mapping[str, Rows], rows: "ViewRows") -> None:
        """Write block number ``index``; from any thread.

        Args:
            index: Number of the block within the shard.
            arrays: Per-block arrays by name, the view axis where the layout has it.
            rows: The rest of what is stored of the block's views.
        """

    @abstractmethod
    def finish(self, rows: "ViewRows") -> None:
        """Write what is stored once a shard; ``rows`` are those of all its blocks."""

    @abstractmethod
    def discard(self) -> None:
        """Forget a shard that will not be finished; harmless after :meth:`finish`."""


class PassReader(ABC):
    """Reads the passes of a cache, each file against its commit record."""

    @abstractmethod
    def read(
        self, pass_index: int, shard: int, num_rows: int, rows: range, names: Iterable[str]
    ) -> dict[str, Rows]:
        """Read rows of a shard.

        Args:
            pass_index: Number of the pass.
            shard: Number of the shard.
            num_rows: Views in the shard.
            rows: Rows of the shard.
            names: Arrays wanted; :data:`IMAGE` where the cache embeds images.

        Returns:
            Array by name, view axis first, in memory of its own.

        Raises:
            CacheCorrupt: A file is missing or is not the one committed.
        """

    @abstractmethod
    def image_ranges(self, pass_index: int, shard: int, num_rows: int) -> tuple[str, Rows] | None:
        """The file with a shard's images, and ``(view, 2)`` offsets and sizes in it, if any."""


class Form(ABC):
    """One of the two ways to store the passes of a cache. Frozen and comparable.

    Attributes:
        name: Name of the form, as in ``--format``.
        embed: What images the cache holds.
        separates_targets: Whether one target can be read or fetched without the others.
    """

    name: ClassVar[Literal["zarr", "webdataset"]]
    separates_targets: ClassVar[bool]
    embed: Embed

    @property
    def overhead_bytes(self) -> int:
        """Approximate bytes that a view takes besides its compressed arrays and its image."""
        return 0

    @property
    def summary(self) -> str | None:
        """What the form stores, for ``scalekd cache info``; None for the usual form."""
        return None

    @abstractmethod
    def documents(self) -> dict[str, bytes]:
        """Files that are written before the plan and say which form the cache has."""

    @abstractmethod
    def pass_documents(self, layout: "Layout", pass_index: int) -> dict[str, bytes]:
        """Documents that say how the arrays of a pass are stored, by path."""

    @abstractmethod
    def final_documents(self, rows_of: Callable[[int], int], num_shards: int) -> dict[str, bytes]:
        """Documents that are written before the manifest.

        Args:
            rows_of: Views of a shard of pass 0.
            num_shards: Shards of the cache.
        """

    @abstractmethod
    def pass_files(self, layout: "Layout", pass_index: int, shard: int, num_rows: int) -> list[str]:
        """Paths of all files of a shard with ``num_rows`` views."""

    @abstractmethod
    def zarr_arrays(self, layout: "Layout") -> tuple["ArraySpec", ...]:
        """Arrays of a pass that are stored as Zarr arrays."""

    @abstractmethod
    def part_of(self, relative: str, unit: object) -> str:
        """What a file of a shard counts towards in a table of sizes, such as ``stage4/values``."""

    @abstractmethod
    def reader(self, files: CommittedFiles, layout: "Layout") -> PassReader:
        """A reader of the passes."""

    @abstractmethod
    def shard_files(self, target: ShardTarget, pass_index: int, shard: int) -> ShardFiles:
        """Begin the files of a shard."""

    @abstractmethod
    def __str__(self) -> str:
        """The form, for messages."""
