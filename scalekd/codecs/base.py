"""The contract of codecs.

A *codec* turns a block of views into a few arrays, its *planes*, and back. One feature codec
belongs to one stage, and has the stage's :class:`~scalekd.shapes.FeatureShape`.

Encoding runs on the CPU with NumPy, beside the teacher, and may be called from several threads at
once: ``encode`` does not change the codec. It takes one or more views, and the encoding of a view
depends neither on the other views of the call nor on their number. It refuses NaN, infinity and
wrong shapes with an error that names the token and the view, by its index in the call.

The view axis of a stored plane is where it compresses best: a plane is an array of shape
``(*shape_before, view, *shape_after)``. :meth:`PlaneSpec.zarr_kwargs` returns its Zarr v3 codecs,
all of them from zarr and numcodecs, so that any Zarr reader gets the stored integers without this
package. :meth:`PlaneSpec.pack` compresses one array in the same way, outside Zarr.

Decoding has two steps. Readers of the planes get small integers. The module that
``codec.decoder()`` returns decodes batches of them on the training device; its tables are buffers,
which move with ``.to(device)``. It takes planes as tensors with the view axis **first**, whatever
the stored layout.

A codec is described by a JSON configuration (``to_config``) and by tables (``tables``), arrays that
go into a safetensors file. ``codec_from_config(config, tables, shape)`` rebuilds it exactly:
same planes for the same features. Configurations carry the codec's name and version; the
decoded values of a version never change, which is tested with frozen bytes of each version.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from scalekd.codecs.planes import PlaneSpec
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError, UsageError
from scalekd.shapes import FeatureShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scalekd.codecs.decoders import FeatureDecoder, LogitDecoder
    from scalekd.codecs.encoder import FeatureEncoder

Planes = Mapping[str, np.ndarray]
JsonDict = dict[str, Any]


class Codec(ABC):
    """Base class of feature and logit codecs: planes, configuration and tables."""

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    @abstractmethod
    def planes(self) -> tuple[PlaneSpec, ...]:
        """Specifications of the arrays that :meth:`encode` returns, in a fixed order."""

    def to_config(self) -> JsonDict:
        """Return the configuration as JSON types; with :meth:`tables` it describes the codec."""
        return {"codec": self.name, "version": self.version}

    @classmethod
    def check_config(cls, config: JsonDict, *, keys: frozenset[str] = frozenset()) -> None:
        """Check name, version and keys of a configuration, which may be damaged or malicious.

        Args:
            config: Configuration as read from JSON.
            keys: Expected keys besides ``codec`` and ``version``.

        Raises:
            CacheMismatch: The codec is another one, or its version is unknown to this release.
            CacheCorrupt: Keys are missing or unknown.
        """
        if config.get("codec") != cls.name:
            raise CacheMismatch(
                f"the configuration describes codec {config.get('codec')!r}, not {cls.name!r}"
            )
        if config.get("version") != cls.version:
            raise CacheMismatch(
                f"codec {cls.name!r} is stored in version {config.get('version')!r} and this"
                f" release reads version {cls.version}; install the release that wrote the cache,"
                " or newer"
            )
        stored = frozenset(config) - {"codec", "version"}
        if stored != keys:
            raise CacheCorrupt(
                f"configuration of codec {cls.name!r} has keys {sorted(stored)}, expected"
                f" {sorted(keys)}"
            )

    def tables(self) -> dict[str, np.ndarray]:
        """Return the arrays fitted on calibration views; empty for a codec without tables."""
        return {}

    def check_planes(self, planes: Planes) -> int:
        """Return the number of views in stored planes.

        Raises:
            CacheCorrupt: A plane is missing, or its type, shape or number of views differs.
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

    def tensors(self, planes: Planes) -> "dict[str, Tensor]":
        """Check stored planes and return them as tensors with the view axis first."""
        import torch

        self.check_planes(planes)
        return {
            spec.name: torch.from_numpy(np.ascontiguousarray(spec.views_first(planes[spec.name])))
            for spec in self.planes
        }

    def pack(self, planes: Planes) -> dict[str, bytes]:
        """Compress stored planes outside Zarr, to one byte string per plane."""
        self.check_planes(planes)
        return {spec.name: spec.pack(planes[spec.name]) for spec in self.planes}


class FeatureCodec(Codec):
    """Base class of codecs of one stage's dense features."""

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
            DataError: A value is NaN, infinite, or out of the range of the codec.
            UsageError: The features have another shape or type than the codec expects.
        """

    @property
    def views_at_once(self) -> int:
        """Number of views that :meth:`encode` processes at a time.

        Splitting a batch at multiples of this number does not change the planes. At other
        boundaries a matrix product has another number of rows and may round differently.
        """
        return 1

    def encoder(self, num_views: int) -> "FeatureEncoder | None":
        """Return a new device encoder, on the CPU; ``None`` if the codec has none.

        Args:
            num_views: Largest number of views in a batch; smaller batches are padded to it.
        """
        del num_views
        return None

    @abstractmethod
    def decoder(self, *, compute_dtype: "torch.dtype | None" = None) -> "FeatureDecoder":
        """Return a new decoder module, on the CPU.

        Args:
            compute_dtype: Type of the matrix products, float32 (the default) or bfloat16; the
                output is float32.
        """

    @classmethod
    def from_config(
        cls, config: JsonDict, tables: Mapping[str, np.ndarray], shape: FeatureShape
    ) -> Self:
        """Rebuild a codec from :meth:`to_config` and :meth:`tables`.

        A codec with options or tables overrides this method.

        Raises:
            CacheMismatch: The codec is another one, or its version is unknown to this release.
            CacheCorrupt: The configuration or tables are invalid for features of this shape.
        """
        cls.check_config(config)
        if tables:
            raise CacheCorrupt(
                f"codec {cls.name!r} has no tables, but the cache contains {sorted(tables)}"
            )
        return cls(shape)

    @classmethod
    def outline(cls, config: JsonDict, shape: FeatureShape) -> tuple[PlaneSpec, ...]:
        """Return the planes of a configuration; sizes that depend on tables are 1.

        Raises:
            CacheCorrupt, CacheMismatch: As for :meth:`from_config`.
        """
        return cls.from_config(config, {}, shape).planes

    def decode(self, planes: Planes) -> np.ndarray:
        """Decode stored planes on the CPU to float32 ``(view, token, channel)``."""
        import torch

        tensors = self.tensors(planes)
        with torch.inference_mode():
            return np.asarray(self.decoder()(tensors).numpy())

    def check_features(self, features: np.ndarray) -> None:
        """Refuse features that no codec can encode; see :meth:`encode` for the errors."""
        expected = (self.shape.num_tokens, self.shape.num_channels)
        if features.ndim != 3 or features.shape[1:] != expected or features.shape[0] == 0:
            raise UsageError(
                f"features of shape {features.shape} do not fit the codec's {self.shape}: "
                f"expected (view, {expected[0]}, {expected[1]}) with at least one view"
            )
        if features.dtype not in (np.float16, np.float32):
            raise UsageError(f"features are {features.dtype}; expected float16 or float32")
        # One pass without a temporary array: the sum is finite unless a value is not or the sum
        # overflows; only then are the values checked one by one.
        with np.errstate(invalid="ignore", over="ignore"):
            total = features.sum(dtype=np.float64)
        if np.isfinite(total):
            return
        bad = ~np.isfinite(features)
        if bad.any():
            view, token, channel = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"features of view {view} contain {features[view, token, channel]} at token"
                f" {token}, channel {channel} ({int(bad.sum())} such values in this block of "
                f"{features.shape[0]} views); the teacher overflowed or its weights are damaged"
            )


class LogitCodec(Codec):
    """Base class of codecs of a classifier's scores before softmax."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise UsageError(f"a logit codec needs at least one class, got {num_classes}")
        self.num_classes = num_classes

    @classmethod
    @abstractmethod
    def from_config(cls, config: JsonDict) -> Self:
        """Rebuild a codec from :meth:`to_config`; see :meth:`FeatureCodec.from_config`."""

    @abstractmethod
    def encode(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Encode float16 or float32 logits ``(view, class)``.

        Raises:
            DataError: A value is NaN, infinite, or out of the range of the codec.
            UsageError: The logits have another shape or type than the codec expects.
        """

    @abstractmethod
    def decoder(self) -> "LogitDecoder":
        """Return a new decoder module, on the CPU."""

    def decode(self, planes: Planes) -> dict[str, np.ndarray]:
        """Decode stored planes on the CPU."""
        import torch

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
                f"logits of view {view} contain {logits[view, column]} at class {column}; "
                "the teacher overflowed or its weights are damaged"
            )
