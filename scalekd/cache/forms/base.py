"""The interface of the two forms of a cache.

The passes of a cache are stored as Zarr arrays or as tars; its samples are Zarr arrays in both
forms. Code outside this package does not depend on the form.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from scalekd.cache.files import CommittedFiles
from scalekd.options import Embed
from scalekd.shapes import Rows

if TYPE_CHECKING:
    from scalekd.cache.layout import ArraySpec, Layout, Unit
    from scalekd.cache.writing.rows import ViewRows

RENDERED: tuple[Embed, ...] = ("view", "pixels")
"""Kinds with the pixels that the teacher saw, at the teacher's size."""

HAS_IMAGES: tuple[Embed, ...] = ("source", "view")
"""Kinds with an encoded image for each view, in a member of a tar."""

IMAGE = "image"
"""Name of a block's embedded images among its arrays; an array of ``bytes`` objects."""


class ShardTarget(Protocol):
    """What :class:`ShardFiles` write to: the writer of the cache."""

    root: Path
    layout: "Layout"

    def put(self, relative: str, data: bytes | memoryview) -> None:
        """Commit a file of a claimed shard."""

    def write(self, unit: "Unit", array: "ArraySpec", start: int, rows: Rows) -> None:
        """Write rows of a Zarr array, padded to whole chunks."""


class ShardFiles(ABC):
    """The files of one shard of a pass while they are written; blocks may arrive in any order."""

    @abstractmethod
    def append(self, index: int, arrays: Mapping[str, Rows], rows: "ViewRows") -> None:
        """Write a block; may be called from any thread.

        Args:
            index: Number of the block in the shard.
            arrays: Per-block arrays by name, with the view axis where the layout has it.
            rows: The other values of the block's views.
        """

    @abstractmethod
    def finish(self, rows: "ViewRows") -> None:
        """Write the per-shard values; ``rows`` are those of all blocks."""

    def discard(self) -> None:  # noqa: B027 (nothing to do by default)
        """Release the resources of a shard that will not be finished."""


class PassReader(ABC):
    """Reads the passes of a cache; compares each file with its commit record."""

    @abstractmethod
    def read(
        self, pass_index: int, shard: int, num_rows: int, rows: range, names: Iterable[str]
    ) -> dict[str, Rows]:
        """Read rows of a shard.

        Args:
            pass_index: Number of the pass.
            shard: Number of the shard.
            num_rows: Number of views in the shard.
            rows: Rows of the shard to read.
            names: Arrays to read; also :data:`IMAGE` if the cache embeds encoded images.

        Returns:
            New arrays by name, view axis first.

        Raises:
            CacheCorrupt: A file is missing or is not the one committed.
        """

    def image_ranges(self, pass_index: int, shard: int, num_rows: int) -> tuple[str, Rows] | None:
        """Return the path of a shard's tar, and the offset and size of each image in it.

        ``None`` by default. See :meth:`scalekd.cache.CacheReader.image_ranges`.
        """
        del pass_index, shard, num_rows
        return None


class Form(ABC):
    """One of the two ways to store the passes of a cache. Immutable and comparable.

    Attributes:
        name: Name of the form, as in ``--format``.
        embed: Kind of images that the cache embeds.
        separates_targets: Whether a target can be read or fetched without the others.
    """

    name: ClassVar[Literal["zarr", "webdataset"]]
    separates_targets: ClassVar[bool]
    embed: Embed

    @property
    def overhead_bytes(self) -> int:
        """Approximate size of a view in addition to its compressed arrays and its image."""
        return 0

    @property
    def summary(self) -> str | None:
        """Description for ``scalekd cache info``; ``None`` for the default form."""
        return None

    @abstractmethod
    def documents(self) -> dict[str, bytes]:
        """Return the documents that identify the form, by path; written before the plan."""

    @abstractmethod
    def pass_documents(self, layout: "Layout", pass_index: int) -> dict[str, bytes]:
        """Return the documents that describe how the arrays of a pass are stored, by path."""

    def final_documents(self, rows_of: Callable[[int], int], num_shards: int) -> dict[str, bytes]:
        """Return the documents that are written before the manifest, by path; none by default.

        Args:
            rows_of: Function that returns the number of views in a shard of pass 0.
            num_shards: Number of shards of the cache.
        """
        del rows_of, num_shards
        return {}

    @abstractmethod
    def pass_files(self, layout: "Layout", pass_index: int, shard: int, num_rows: int) -> list[str]:
        """Return the paths of all files of a shard with ``num_rows`` views."""

    @abstractmethod
    def zarr_arrays(self, layout: "Layout") -> tuple["ArraySpec", ...]:
        """Return the arrays of a pass that are stored as Zarr arrays."""

    @abstractmethod
    def part_of(self, relative: str, unit: object) -> str:
        """Return the row of a file in a table of sizes, such as ``stage4/values``."""

    @abstractmethod
    def reader(self, files: CommittedFiles, layout: "Layout") -> PassReader:
        """Return a reader of the passes."""

    @abstractmethod
    def shard_files(self, target: ShardTarget, pass_index: int, shard: int) -> ShardFiles:
        """Begin the files of a shard."""

    @abstractmethod
    def __str__(self) -> str:
        """Name of the form for messages."""
