"""Logit codecs: all classes in half precision, or the K likeliest and the remaining mass.

Softmax ignores a common offset, so ``topk`` stores scores and their log-sum-exp relative to the
largest score: half precision is finest near zero, where the likely classes are. From the
probability mass of the other classes, spread evenly, the distribution follows at any temperature.
"""

from typing import TYPE_CHECKING, Self

import numpy as np

from scalekd.codecs.base import JsonDict, LogitCodec
from scalekd.codecs.planes import PlaneSpec
from scalekd.errors import CacheCorrupt, DataError, UsageError

if TYPE_CHECKING:
    from scalekd.codecs.decoders import LogitDecoder


class FullLogitCodec(LogitCodec):
    """Every class in half precision; decodes to ``logits``: float32 ``(view, class)``."""

    name = "full"

    @property
    def planes(self) -> tuple[PlaneSpec, ...]:
        classes = (self.num_classes,)
        return (PlaneSpec("values", np.dtype("float16"), shape_after=classes, page_values=262_144),)

    def encode(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        self.check_logits(logits)
        with np.errstate(over="ignore"):
            values = logits.astype(np.float16)
        overflow = ~np.isfinite(values)
        if overflow.any():
            view, column = (int(i) for i in np.argwhere(overflow)[0])
            raise DataError(
                f"logits of view {view} reach {logits[view, column]:.6g} at class {column}, beyond "
                "float16's 65504; use --logits topk:K, which stores differences"
            )
        return {"values": np.ascontiguousarray(values)}

    def decoder(self) -> "LogitDecoder":
        from scalekd.codecs.decoders import FullDecoder

        return FullDecoder()

    def to_config(self) -> JsonDict:
        return {**super().to_config(), "num_classes": self.num_classes}

    @classmethod
    def from_config(cls, config: JsonDict) -> Self:
        cls.check_config(config, keys=frozenset({"num_classes"}))
        return cls(_positive(config, "num_classes"))


class TopKLogitCodec(LogitCodec):
    """The scores of the K likeliest classes, likeliest first.

    Decodes to ``indices`` int64 ``(view, k)``; ``log_probs`` float32 ``(view, k)``,
    log-probabilities at temperature 1; ``log_sum_exp`` float32 ``(view,)`` of the scores *relative
    to the largest* (so ``log_probs + log_sum_exp`` are logits whose maximum is 0); ``tail_mass``
    float32 ``(view,)``, the probability of all other classes together at temperature 1.

    Scores more than 65504 below the largest are stored as -65504: probability zero either way.
    """

    name = "topk"

    def __init__(self, num_classes: int, num_kept: int) -> None:
        super().__init__(num_classes)
        if not 1 <= num_kept <= num_classes:
            raise UsageError(
                f"--logits topk:{num_kept}: the teacher has {num_classes:,} classes; give a number"
                f" from 1 to {num_classes}, or --logits full"
            )
        self.num_kept = num_kept

    @property
    def planes(self) -> tuple[PlaneSpec, ...]:
        index_type = np.dtype("uint16" if self.num_classes <= 65_536 else "uint32")
        kept = (self.num_kept,)
        return (
            # Stored by rank: scores of one rank are similar, and those of the first are all zero.
            PlaneSpec("indices", index_type, shape_before=kept, page_values=262_144),
            PlaneSpec("scores", np.dtype("float16"), shape_before=kept, page_values=4_096),
            PlaneSpec("log_sum_exp", np.dtype("float32"), page_values=262_144),
            PlaneSpec("tail_mass", np.dtype("float32"), page_values=262_144),
        )

    def encode(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        self.check_logits(logits)
        values = logits.astype(np.float64)
        values -= values.max(axis=1, keepdims=True)
        # A stable sort: equal scores keep the order of their classes on every machine.
        order = np.argsort(-values, axis=1, kind="stable")
        kept, rest = order[:, : self.num_kept], order[:, self.num_kept :]
        weights = np.exp(values)
        total = weights.sum(axis=1)
        tail = np.take_along_axis(weights, rest, axis=1).sum(axis=1) / total
        scores = np.maximum(np.take_along_axis(values, kept, axis=1), -65504.0)
        index_type = self.planes[0].dtype
        return {
            "indices": np.ascontiguousarray(kept.T.astype(index_type)),
            "scores": np.ascontiguousarray(scores.T.astype(np.float16)),
            "log_sum_exp": np.log(total).astype(np.float32),
            "tail_mass": tail.astype(np.float32),
        }

    def decoder(self) -> "LogitDecoder":
        from scalekd.codecs.decoders import TopKDecoder

        return TopKDecoder(self.num_classes)

    def to_config(self) -> JsonDict:
        return {
            **super().to_config(),
            "num_classes": self.num_classes,
            "num_kept": self.num_kept,
        }

    @classmethod
    def from_config(cls, config: JsonDict) -> Self:
        cls.check_config(config, keys=frozenset({"num_classes", "num_kept"}))
        num_classes, num_kept = _positive(config, "num_classes"), _positive(config, "num_kept")
        if num_kept > num_classes:
            raise CacheCorrupt(
                f"configuration of codec 'topk' keeps {num_kept} of {num_classes} classes"
            )
        return cls(num_classes, num_kept)


def _positive(config: JsonDict, key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CacheCorrupt(f"codec configuration has {key}={value!r}, expected a positive integer")
    return value
