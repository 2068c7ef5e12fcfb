"""Arrays with one axis that counts views: element type, layout and compression."""

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scalekd.codecs.compression import Compression
from scalekd.errors import CacheCorrupt

# pcodec codes a page with one table of bins (about 60 bytes): long pages have fewer tables, short
# ones fit the data more closely. 2**16 is best for coefficients sorted by scale; this is 0.001 bit
# worse and decodes 3 % faster (docs/LOG.md).
DEFAULT_PAGE_VALUES = 131_072
_LEAST_PAGE_VALUES = 4_096  # best for single views; measured from 2**10 to 2**14
_FEW_VIEWS = 64


@dataclass(frozen=True)
class PlaneSpec:
    """One array of a codec: its element type, its layout and how its bytes are compressed.

    Attributes:
        name: Name of the plane, unique within the codec, of letters, digits and underscores.
        dtype: Element type; values are stored little-endian.
        shape_before: Sizes of the axes before the view axis in the stored array.
        shape_after: Sizes of the axes after the view axis in the stored array.
        compression: ``pcodec`` for 16-, 32- and 64-bit numbers, ``zstd`` for all types; ``blosc``
            is used for the small arrays of a cache only, not for planes of codecs.
        page_values: Number of values that share one table of ``pcodec``.
        level: Level of ``zstd``.
    """

    name: str
    dtype: np.dtype[Any]
    shape_before: tuple[int, ...] = ()
    shape_after: tuple[int, ...] = ()
    compression: Compression = "pcodec"
    page_values: int = DEFAULT_PAGE_VALUES
    level: int = 3

    @property
    def view_axis(self) -> int:
        """Index of the view axis in the stored array."""
        return len(self.shape_before)

    @property
    def values_per_view(self) -> int:
        """Number of values of one view."""
        return math.prod(self.shape_before + self.shape_after)

    @property
    def bytes_per_view(self) -> int:
        """Size of one view in memory, uncompressed, in bytes."""
        return self.values_per_view * self.dtype.itemsize

    def stored_shape(self, num_views: int) -> tuple[int, ...]:
        """Return the shape of the stored array of some number of views."""
        return (*self.shape_before, num_views, *self.shape_after)

    def views_first(self, stored: np.ndarray) -> np.ndarray:
        """Return a view of the stored array with the view axis first, as decoders take it."""
        return np.moveaxis(stored, self.view_axis, 0)

    def check(self, stored: np.ndarray) -> int:
        """Return the number of views of a stored array of this plane.

        Raises:
            CacheCorrupt: The array has another element type or another shape.
        """
        shape, axis = stored.shape, self.view_axis
        if (
            stored.dtype != self.dtype
            or len(shape) != axis + 1 + len(self.shape_after)
            or shape != self.stored_shape(shape[axis])
        ):
            expected = (*self.shape_before, "view", *self.shape_after)
            raise CacheCorrupt(
                f"plane {self.name!r} is {stored.dtype}{shape}, but its codec stores "
                f"{self.dtype}{expected}: the array belongs to another cache or is damaged"
            )
        return int(shape[axis])

    def zarr_kwargs(self) -> dict[str, Any]:
        """Return serializer, compressors and filters for ``zarr.create_array``.

        Every chunk of a codec ends with a crc32c of its compressed bytes, so that readers without
        the commit records of the cache also detect damage.
        """
        from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
        from zarr.codecs.numcodecs import PCodec

        if self.compression == "blosc":
            return {"compressors": BloscCodec(cname="zstd", clevel=9, shuffle="shuffle")}
        if self.compression == "zstd":
            return {
                "filters": (),
                "serializer": BytesCodec(),
                "compressors": (ZstdCodec(level=self.level), Crc32cCodec()),
            }
        with quiet_zarr():
            serializer = PCodec(**self._pcodec_config())
        return {"filters": (), "serializer": serializer, "compressors": (Crc32cCodec(),)}

    def pack(self, stored: np.ndarray) -> bytes:
        """Compress one array of this plane like a chunk of Zarr, without the checksum.

        Few views get shorter pages: a page of one view's sorted coefficients would otherwise have
        values of different scales (28 instead of 9 % more bytes than in a block of 256).
        """
        num_views = self.check(stored)
        contiguous = np.ascontiguousarray(stored)
        if self.compression == "zstd":
            from numcodecs.zstd import Zstd

            return bytes(Zstd(level=self.level).encode(contiguous))
        from numcodecs.pcodec import PCodec

        config = self._pcodec_config()
        if self.shape_before and num_views < _FEW_VIEWS:
            least = min(_LEAST_PAGE_VALUES, self.page_values)
            config["equal_pages_up_to"] = max(least, self.page_values * num_views // _FEW_VIEWS)
        return bytes(PCodec(**config).encode(contiguous))

    def _pcodec_config(self) -> dict[str, Any]:
        # Level 8, classic, no delta: neighbouring values are independent draws of one
        # distribution, so that pcodec's search for modes and deltas would only cost time.
        return {
            "level": 8,
            "mode_spec": "classic",
            "delta_spec": "none",
            "equal_pages_up_to": self.page_values,
        }


@dataclass
class _SharedFilter:
    """Number of threads inside `quiet_zarr`, and the filters to restore after the last one."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_inside: int = 0
    before: "warnings.catch_warnings[None]" = field(default_factory=warnings.catch_warnings)


_FILTER = _SharedFilter()


@contextmanager
def quiet_zarr() -> Iterator[None]:
    """Silence zarr's notice that numcodecs' codecs are not in the Zarr v3 specification.

    zarr warns whenever such an array is created or opened. The codec is deliberate: the manifest
    names it, and zarr itself has its reader.

    Warning filters belong to the process, and zarr opens arrays in a thread of its own, so the
    filter stays from the first thread that enters until the last one leaves. With one
    ``catch_warnings`` per thread, the first thread to leave would remove the others' filter.
    """
    with _FILTER.lock:
        if _FILTER.num_inside == 0:
            _FILTER.before = warnings.catch_warnings()
            _FILTER.before.__enter__()
            warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr")
        _FILTER.num_inside += 1
    try:
        yield
    finally:
        with _FILTER.lock:
            _FILTER.num_inside -= 1
            if _FILTER.num_inside == 0:
                _FILTER.before.__exit__(None, None, None)
