"""The arrays of a cache, their paths, and how each is divided into files.

``samples/…`` is the same for all passes: key, label and hash of the encoded image of each sample.
``passes/0007/…`` contains one view of every sample: its parameters, the hash of its pixels, and the
teacher's targets. Row ``i`` of every array belongs to the same sample.

Targets are divided into *blocks*, the unit of reading: one block of one array is one file. The
small arrays are divided into *shards*, the unit of commit, because every file has a cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from scalekd.cache.documents.manifest import Identity
from scalekd.codecs.compression import Compression
from scalekd.codecs.planes import PlaneSpec
from scalekd.errors import CacheCorrupt

if TYPE_CHECKING:
    from scalekd.cache.forms.base import Form

SAMPLES = "samples"
PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"
TABLES_FOLDER = "tables"
RECORDS_FOLDER = "records"
EXTENSIONS_FOLDER = "extensions"
SELECTION_FOLDER = "selection"
SEPARATOR = ":"
"""Separates the name of an extension from the name of one of its arrays."""
COMPANIONS = ("README.md", ".gitattributes")
"""Files of a Hub repository that are not part of the cache: card, and git's list of large files."""
LEASE_SUFFIX = ".lease"

_MAX_CHUNK_BYTES = 2**31 - 1  # Blosc's own limit; Swin-L's stage 3 in fp16 needs 77 MB

Unit = str | int
"""``"samples"`` or the number of a pass."""


@dataclass(frozen=True)
class ArraySpec(PlaneSpec):
    """One array of a cache: a plane of a codec, or one of the small arrays.

    Attributes:
        name: Path inside its group, such as ``stage4/codes``.
        compression: ``blosc`` for the small arrays, which are divided into shards; planes of
            codecs are divided into blocks.
    """

    compression: Compression = "blosc"

    @property
    def per_block(self) -> bool:
        """Whether the array is divided into blocks, like planes of codecs, and not into shards."""
        return self.compression != "blosc"

    def shape(self, identity: Identity) -> tuple[int, ...]:
        """Return the shape for all samples of a cache."""
        return self.stored_shape(identity.data.num_samples)

    def chunks(self, identity: Identity) -> tuple[int, ...]:
        """Return the shape of one chunk, which is one file."""
        return self.stored_shape(self.rows_per_chunk(identity))

    def rows_per_chunk(self, identity: Identity) -> int:
        """Return the number of views in a chunk."""
        return identity.block_size if self.per_block else identity.shard_size

    def chunk_files(self, identity: Identity, unit: Unit, shard: int, rows: int) -> Iterator[str]:
        """Yield the paths of the files with the first ``rows`` rows of a shard."""
        step = self.rows_per_chunk(identity)
        first = shard * identity.shard_size // step
        for index in range(first, first + -(-rows // step)):
            yield chunk_path(unit, self, index)

    @staticmethod
    def of_plane(group: str, plane: PlaneSpec) -> "ArraySpec":
        """Return the array of a codec's plane in a group such as ``stage4``."""
        return ArraySpec(**vars(plane) | {"name": f"{group}/{plane.name}"})


def unit_path(unit: Unit) -> str:
    """Return the folder of the samples or of a pass."""
    return SAMPLES if unit == SAMPLES else f"passes/{unit:04d}"


def array_path(unit: Unit, array: ArraySpec) -> str:
    """Return the folder of an array."""
    return f"{unit_path(unit)}/{array.name}"


def chunk_path(unit: Unit, array: ArraySpec, index: int) -> str:
    """Return the path of chunk ``index`` along the view axis (Zarr v3's default key encoding)."""
    before, after = ("0",) * len(array.shape_before), ("0",) * len(array.shape_after)
    return f"{array_path(unit, array)}/c/{'/'.join((*before, str(index), *after))}"


@dataclass(frozen=True)
class ShardId:
    """One shard of the samples or of a pass: the unit of commit.

    Attributes:
        unit: ``"samples"`` or the number of the pass.
        number: Number of the shard.
    """

    unit: Unit
    number: int

    @property
    def record_path(self) -> str:
        """Path of the shard's commit record."""
        folder = SAMPLES if self.unit == SAMPLES else f"{self.unit:04d}"
        return f"{RECORDS_FOLDER}/{folder}/{self.number:06d}.json"

    @property
    def lease_path(self) -> str:
        """Path of the shard's lease, which exists while a process writes the shard."""
        return self.record_path.removesuffix(".json") + LEASE_SUFFIX

    def __str__(self) -> str:
        unit = "the samples" if self.unit == SAMPLES else f"pass {self.unit}"
        return f"shard {self.number} of {unit}"


def group_paths(unit: Unit, arrays: tuple[ArraySpec, ...]) -> Iterator[str]:
    """Yield the metadata documents of a unit: groups from the root down, then arrays."""
    groups = {PurePosixPath(".")}
    for array in arrays:
        groups.update(PurePosixPath(array_path(unit, array)).parents)
    yield from (str(group / "zarr.json") for group in sorted(groups))
    yield from (f"{array_path(unit, array)}/zarr.json" for array in arrays)


@dataclass(frozen=True)
class Layout:
    """The arrays of a cache, those of its samples and those of each pass, and their files.

    Attributes:
        identity: Identity of the cache.
        samples: Arrays of the samples.
        views: Arrays of each pass.
        form: Form in which the passes are stored.
    """

    identity: Identity
    samples: tuple[ArraySpec, ...]
    views: tuple[ArraySpec, ...]
    form: "Form"

    def __post_init__(self) -> None:
        names = [array.name for array in self.samples + self.views]
        if len(set(names)) != len(names):
            raise CacheCorrupt(f"two arrays of a cache share a name: {sorted(names)}")
        for array in self.samples + self.views:
            size = array.rows_per_chunk(self.identity) * array.bytes_per_view
            if size > _MAX_CHUNK_BYTES:
                raise CacheCorrupt(
                    f"array {array.name}: one file would have {size:,} bytes, more than the"
                    f" {_MAX_CHUNK_BYTES:,} allowed; use smaller blocks"
                )

    def arrays(self, unit: Unit) -> tuple[ArraySpec, ...]:
        """Return the arrays of the samples or of a pass."""
        return self.samples if unit == SAMPLES else self.views

    def zarr_arrays(self, unit: Unit) -> tuple[ArraySpec, ...]:
        """Return the arrays of a unit that are stored as Zarr arrays."""
        return self.samples if unit == SAMPLES else self.form.zarr_arrays(self)

    def unit_files(self, unit: Unit, shard: int, num_rows: int) -> list[str]:
        """Return the paths of all files of a shard, in order; none if it has no rows."""
        if isinstance(unit, int):
            return self.form.pass_files(self, unit, shard, num_rows)
        return self.chunk_files(unit, shard, num_rows)

    def chunk_files(self, unit: Unit, shard: int, num_rows: int) -> list[str]:
        """Return the paths of all files of a shard whose arrays are all Zarr arrays."""
        return [
            path
            for array in self.arrays(unit)
            for path in array.chunk_files(self.identity, unit, shard, num_rows)
        ]

    def find(self, name: str) -> ArraySpec:
        """Return the array of a pass with a name such as ``stage4/codes``."""
        for array in self.views:
            if array.name == name:
                return array
        raise KeyError(name)


def sample_arrays(max_key_bytes: int) -> tuple[ArraySpec, ...]:
    """Return the arrays of the samples: key in UTF-8, label or -1, xxh3-64 of the encoded image."""
    return (
        ArraySpec("key", np.dtype(np.uint8), shape_after=(max_key_bytes,)),
        ArraySpec("label", np.dtype(np.int32)),
        ArraySpec("source_hash", np.dtype(np.uint64)),
    )


DIFFERENCES = "pixels/differences"
"""Name of the array of embedded pixels; see :mod:`scalekd.views._differences`."""


def pixel_arrays(view_size: tuple[int, int]) -> tuple[ArraySpec, ...]:
    """Return the array of a cache that embeds the pixels of its views."""
    shape, byte = (3, *view_size), np.dtype(np.uint8)
    # Level 1 of zstd makes differences smaller than level 3, in less than half the time.
    return (ArraySpec(DIFFERENCES, byte, shape_after=shape, compression="zstd", level=1),)


def view_arrays(columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> tuple[ArraySpec, ...]:
    """Return the arrays of the view parameters, and of the hash of each view's pixels."""
    return (
        *(
            ArraySpec(f"view/{name}", np.dtype(dtype), shape_after=shape)
            for name, (dtype, shape) in columns.items()
        ),
        ArraySpec("pixel_hash", np.dtype(np.uint64)),
    )
