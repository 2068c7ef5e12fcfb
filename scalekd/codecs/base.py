"""The contract that every codec keeps.

A *codec* turns a block of views into a few arrays, its *planes*, and back. One feature codec
belongs to one stage: it knows the stage's :class:`~scalekd.shapes.FeatureShape`.

Encoding runs on the CPU with NumPy, beside the teacher, and may be called from several threads at
once: ``encode`` reads the codec and changes nothing. It takes any number of views from one up, and
what it makes of a view depends neither on the other views of the call nor on their number. It
refuses NaN, infinity and wrong shapes with an error that names the view (by its place in the
call; the caller knows its key) and the token.

A plane is stored with the view axis wherever it compresses best: an array of shape
``(*shape_before, view, *shape_after)``. :meth:`PlaneSpec.zarr_kwargs` gives the Zarr v3 codecs, all
of them from zarr and numcodecs, so that any Zarr reader gets the stored integers without this
package. :meth:`PlaneSpec.pack` is the same coding for one array outside Zarr.

Decoding has two halves. Whoever reads the planes gets small integers. The module that
``codec.decoder()`` returns turns them into features on the training device, batched; it holds its
tables as buffers, so it moves with ``.to(device)``. It takes planes as tensors with the view axis
**first**, whatever the stored layout.

A codec is described by a JSON configuration (``to_config``) and by tables (``tables``), arrays that
go into a safetensors file. ``codec_from_config(config, tables, shape)`` rebuilds it exactly:
same planes for the same features. Configurations carry the codec's name and version; what a
version decodes to never changes, a test keeps frozen bytes of each.
"""

import math
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scalekd.codecs.encoder import FeatureEncoder
from scalekd.errors import CacheCorrupt, DataError, UsageError
from scalekd.shapes import FeatureShape

Planes = Mapping[str, np.ndarray]
JsonDict = dict[str, Any]

# pcodec codes a page with one table of bins: long pages share the table's cost (about 60 bytes),
# short ones follow the data closer. 2**16 is best for coefficients sorted by scale, this is 0.001
# bit worse and decodes 3 % faster (docs/LOG.md).
DEFAULT_PAGE_VALUES = 131_072
_LEAST_PAGE_VALUES = 4_096  # best for single views; measured from 2**10 to 2**14
_FEW_VIEWS = 64


@dataclass(frozen=True)
class PlaneSpec:
    """One array of a codec: its element type, its layout and how its bytes are compressed.

    Attributes:
        name: Unique within the codec; letters, digits and underscores.
        dtype: NumPy name of the element type; stored little-endian.
        shape_before: Axes before the view axis in the stored array.
        shape_after: Axes after it.
        compression: ``pcodec`` for 16-, 32- and 64-bit numbers, ``zstd`` for anything.
        page_values: With ``pcodec``, the number of values that share one table.
    """

    name: str
    dtype: str
    shape_before: tuple[int, ...] = ()
    shape_after: tuple[int, ...] = ()
    compression: Literal["pcodec", "zstd"] = "pcodec"
    page_values: int = DEFAULT_PAGE_VALUES

    @property
    def view_axis(self) -> int:
        return len(self.shape_before)

    @property
    def values_per_view(self) -> int:
        return math.prod(self.shape_before + self.shape_after)

    @property
    def bytes_per_view(self) -> int:
        """Bytes of one view in memory, uncompressed."""
        return self.values_per_view * np.dtype(self.dtype).itemsize

    def stored_shape(self, num_views: int) -> tuple[int, ...]:
        return (*self.shape_before, num_views, *self.shape_after)

    def views_first(self, stored: np.ndarray) -> np.ndarray:
        """The stored array with the view axis moved first, as the decoder takes it (no copy)."""
        return np.moveaxis(stored, self.view_axis, 0)

    def check(self, stored: np.ndarray) -> int:
        """Return the number of views of a stored array of this plane.

        Raises:
            CacheCorrupt: The array has another element type or another shape.
        """
        shape, axis = stored.shape, self.view_axis
        if (
            stored.dtype != np.dtype(self.dtype)
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
        """What ``zarr.create_array`` takes to decide the bytes: serializer, compressors, filters.

        A crc32c of the compressed bytes closes every chunk, so that a reader without our
        records still notices a flipped bit.
        """
        from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
        from zarr.codecs.numcodecs import PCodec

        if self.compression == "zstd":
            return {
                "filters": (),
                "serializer": BytesCodec(),
                "compressors": (ZstdCodec(level=3), Crc32cCodec()),
            }
        with quiet_zarr():
            serializer = PCodec(**self._pcodec_config())
        return {"filters": (), "serializer": serializer, "compressors": (Crc32cCodec(),)}

    def pack(self, stored: np.ndarray) -> bytes:
        """Compress one array of this plane much as a chunk of Zarr is, without the checksum.

        Few views make short pages: a page of one view's sorted coefficients would otherwise mix
        scales (9 instead of 28 % more bytes than in a block of 256).
        """
        num_views = self.check(stored)
        contiguous = np.ascontiguousarray(stored)
        if self.compression == "zstd":
            return bytes(self._zstd().encode(contiguous))
        config = self._pcodec_config()
        if self.shape_before and num_views < _FEW_VIEWS:
            least = min(_LEAST_PAGE_VALUES, self.page_values)
            config["equal_pages_up_to"] = max(least, self.page_values * num_views // _FEW_VIEWS)
        return bytes(self._pcodec(config).encode(contiguous))

    def unpack(self, data: bytes, num_views: int) -> np.ndarray:
        """Invert :meth:`pack`.

        Raises:
            CacheCorrupt: The bytes do not decode to exactly ``num_views`` views.
        """
        out = np.empty(self.stored_shape(num_views), self.dtype)
        try:
            count = self._decompress(data, out.reshape(-1))
        # The Rust and C decoders raise RuntimeError, ValueError and TypeError as they please,
        # and pyo3's PanicException derives from BaseException.
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise CacheCorrupt(
                f"plane {self.name!r}: {len(data)} bytes do not decode ({error}); "
                "the file is damaged"
            ) from error
        if count != out.size:
            raise CacheCorrupt(
                f"plane {self.name!r}: {len(data)} bytes do not decode to the {out.size} values of "
                f"{num_views} views; the file is damaged"
            )
        return out

    def _decompress(self, data: bytes, out: np.ndarray) -> int:
        """Fill ``out`` and return how many values the bytes held, -1 when they went on."""
        if self.compression == "zstd":
            decoded = np.frombuffer(self._zstd().decode(data), self.dtype)
            if decoded.size == out.size:
                out[:] = decoded
            return int(decoded.size)
        from pcodec import standalone

        if out.size == 0:
            return 0
        progress = standalone.simple_decompress_into(data, out)
        return int(progress.n_processed) if progress.finished else -1

    def _pcodec_config(self) -> JsonDict:
        # Level 8, classic, no delta: neighbours are independent draws of one distribution, and
        # pcodec's guesses about modes and deltas only cost time.
        return {
            "level": 8,
            "mode_spec": "classic",
            "delta_spec": "none",
            "equal_pages_up_to": self.page_values,
        }

    @staticmethod
    def _pcodec(config: JsonDict) -> Any:
        from numcodecs.pcodec import PCodec

        return PCodec(**config)

    @staticmethod
    def _zstd() -> Any:
        from numcodecs.zstd import Zstd

        return Zstd(level=3)


@dataclass
class _SharedFilter:
    """How many threads are inside `quiet_zarr`, and what the first of them has to put back."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_inside: int = 0
    before: "warnings.catch_warnings[None]" = field(default_factory=warnings.catch_warnings)


_FILTER = _SharedFilter()


@contextmanager
def quiet_zarr() -> Iterator[None]:
    """Silence zarr's notice that numcodecs' codecs are not in the Zarr v3 specification.

    It is raised whenever such an array is created or opened. The notice is true and chosen: the
    manifest names the codec, and zarr itself ships the reader.

    Warning filters belong to the process, and zarr opens arrays in a thread of its own, so the
    filter stands from the first thread that comes in until the last one has gone out: with one
    ``catch_warnings`` a thread, whoever left first would take away the others' filter.
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


class FeatureDecoder(nn.Module, ABC):
    """Turns planes, view axis first, into features on the planes' device."""

    @abstractmethod
    def forward(self, planes: Mapping[str, Tensor]) -> Tensor:
        """Decode a batch.

        Args:
            planes: By plane name, each ``(view, *shape_before, *shape_after)``.

        Returns:
            float32 ``(view, token, channel)``, prefix tokens first.
        """


class Codec(ABC):
    """What feature codecs and logit codecs share: planes, configuration, tables."""

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    @abstractmethod
    def planes(self) -> tuple[PlaneSpec, ...]:
        """The arrays that :meth:`encode` makes, in a fixed order."""

    @abstractmethod
    def to_config(self) -> JsonDict:
        """JSON-only description; with :meth:`tables` it is the whole codec."""

    def tables(self) -> dict[str, np.ndarray]:
        """Arrays fitted on calibration views; empty for a codec that needs none."""
        return {}

    def check_planes(self, planes: Planes) -> int:
        """Return the number of views in stored planes.

        Raises:
            CacheCorrupt: A plane is missing, has another type or shape, or other views.
        """
        counts = set()
        for spec in self.planes:
            if spec.name not in planes:
                raise CacheCorrupt(
                    f"plane {spec.name!r} of codec {self.name!r} is missing; found {sorted(planes)}"
                )
            counts.add(spec.check(planes[spec.name]))
        if len(counts) != 1:
            raise CacheCorrupt(f"planes of codec {self.name!r} disagree on views: {sorted(counts)}")
        return counts.pop()

    def tensors(self, planes: Planes) -> dict[str, Tensor]:
        """Stored planes as tensors with the view axis first, checked."""
        self.check_planes(planes)
        return {
            spec.name: torch.from_numpy(np.ascontiguousarray(spec.views_first(planes[spec.name])))
            for spec in self.planes
        }

    def pack(self, planes: Planes) -> dict[str, bytes]:
        """Compress stored planes outside Zarr, one byte string a plane."""
        self.check_planes(planes)
        return {spec.name: spec.pack(planes[spec.name]) for spec in self.planes}

    def unpack(self, packed: Mapping[str, bytes], num_views: int) -> dict[str, np.ndarray]:
        """Invert :meth:`pack`; raises :class:`CacheCorrupt` on missing or damaged bytes."""
        missing = [spec.name for spec in self.planes if spec.name not in packed]
        if missing:
            raise CacheCorrupt(f"planes {missing} of codec {self.name!r} are missing")
        return {spec.name: spec.unpack(packed[spec.name], num_views) for spec in self.planes}


class FeatureCodec(Codec):
    """A codec of one stage's dense features."""

    def __init__(self, shape: FeatureShape) -> None:
        self.shape = shape

    @abstractmethod
    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Encode a block of views.

        Args:
            features: float16 or float32 ``(view, token, channel)``, prefix tokens first.

        Returns:
            Stored planes by name, ``(*shape_before, view, *shape_after)``, contiguous.

        Raises:
            DataError: NaN, infinity, or a value the codec cannot hold.
            UsageError: Another shape than the codec's.
        """

    @property
    def views_at_once(self) -> int:
        """Views that :meth:`encode` works on at a time.

        Splitting a batch at multiples of it changes no bit of the planes. Elsewhere a matrix
        product has another number of rows, and may round otherwise.
        """
        return 1

    def encoder(self, num_views: int) -> FeatureEncoder | None:
        """A new device encoder on the CPU; ``None`` where the codec has none.

        Args:
            num_views: Views a batch, at most; smaller batches are padded to it.
        """
        del num_views
        return None

    @abstractmethod
    def decoder(self, *, compute_dtype: torch.dtype = torch.float32) -> FeatureDecoder:
        """A new decoder module on the CPU.

        Args:
            compute_dtype: Type of the matrix products, float32 or bfloat16; output is float32.
        """

    @classmethod
    @abstractmethod
    def from_config(
        cls, config: JsonDict, tables: Mapping[str, np.ndarray], shape: FeatureShape
    ) -> "FeatureCodec":
        """Rebuild a codec from :meth:`to_config` and :meth:`tables`.

        Raises:
            CacheCorrupt: Configuration or tables are not those of a codec of this shape.
        """

    def decode(self, planes: Planes) -> np.ndarray:
        """Decode stored planes on the CPU; float32 ``(view, token, channel)``."""
        tensors = self.tensors(planes)
        with torch.inference_mode():
            return np.asarray(self.decoder()(tensors).numpy())

    def check_features(self, features: np.ndarray) -> None:
        """Refuse what no codec can hold; see :meth:`encode` for the errors."""
        expected = (self.shape.num_tokens, self.shape.num_channels)
        if features.ndim != 3 or features.shape[1:] != expected or features.shape[0] == 0:
            raise UsageError(
                f"features of shape {features.shape} do not fit the codec's {self.shape}: "
                f"expected (view, {expected[0]}, {expected[1]}) with at least one view"
            )
        if features.dtype not in (np.float16, np.float32):
            raise UsageError(f"features are {features.dtype}; expected float16 or float32")
        # One pass without a temporary: a sum is finite unless a term is not, or it overflows;
        # only then look closer.
        with np.errstate(invalid="ignore", over="ignore"):
            total = features.sum(dtype=np.float64)
        if np.isfinite(total):
            return
        bad = ~np.isfinite(features)
        if bad.any():
            view, token, channel = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"features of view {view} hold {features[view, token, channel]} at token {token}, "
                f"channel {channel} ({int(bad.sum())} such values in this block of "
                f"{features.shape[0]} views); the teacher overflowed or its weights are damaged"
            )


class LogitDecoder(nn.Module, ABC):
    """Turns planes of logits, view axis first, into tensors for a loss."""

    @abstractmethod
    def forward(self, planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode a batch; the codec's class says which tensors come back."""


class LogitCodec(Codec):
    """A codec of a classifier's scores before softmax."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise UsageError(f"a logit codec needs at least one class, got {num_classes}")
        self.num_classes = num_classes

    @abstractmethod
    def encode(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Encode float16 or float32 ``(view, class)``; errors as for features."""

    @abstractmethod
    def decoder(self) -> LogitDecoder:
        """A new decoder module on the CPU."""

    def decode(self, planes: Planes) -> dict[str, np.ndarray]:
        """Decode stored planes on the CPU."""
        tensors = self.tensors(planes)
        with torch.inference_mode():
            return {name: value.numpy() for name, value in self.decoder()(tensors).items()}

    def check_logits(self, logits: np.ndarray) -> None:
        """Refuse wrong shapes, NaN and infinity."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or logits.shape[0] == 0:
            raise UsageError(
                f"logits of shape {logits.shape} do not fit the codec: expected "
                f"(view, {self.num_classes}) with at least one view"
            )
        bad = ~np.isfinite(logits)
        if bad.any():
            view, column = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"logits of view {view} hold {logits[view, column]} at class {column}; "
                "the teacher overflowed or its weights are damaged"
            )
