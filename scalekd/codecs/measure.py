"""Errors of decoded features, in the units that the losses measure.

All errors are relative and squared, one number per view. Mean, 95th percentile and maximum over the
views are reported:

* ``raw``: squared distance divided by the squared norm of the whole view, prefix tokens included;
* ``spatial``: mean over patch tokens of the squared distance between unit vectors, the distance
  that the spatial feature loss measures;
* ``frequency``: the same after each view's mean patch token is subtracted, which is what removing
  the zero frequency means.
"""

from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel, Field

from scalekd.shapes import FeatureShape

# A vector shorter than this fraction of its view's largest token is rounding noise without a
# direction; it counts as the zero vector. Float32 sums leave about 1e-7.
_NEGLIGIBLE = 1e-6


class ErrorSummary(BaseModel, frozen=True, extra="forbid"):
    """Statistics over views of a relative squared error."""

    mean: float = Field(ge=0, allow_inf_nan=False)
    p95: float = Field(ge=0, allow_inf_nan=False)
    max: float = Field(ge=0, allow_inf_nan=False)

    @classmethod
    def of(cls, per_view: np.ndarray) -> "ErrorSummary":
        """Summarise one error per view."""
        values = np.asarray(per_view, np.float64)
        return cls(mean=values.mean(), p95=np.percentile(values, 95), max=values.max())


class FeatureErrors(BaseModel, frozen=True, extra="forbid"):
    """Error statistics of raw features and of both targets, with the number of measured views."""

    raw: ErrorSummary
    spatial: ErrorSummary
    frequency: ErrorSummary
    num_views: int = Field(ge=1, le=1 << 40)


def view_errors(
    original: np.ndarray, decoded: np.ndarray, shape: FeatureShape
) -> dict[str, np.ndarray]:
    """Return the errors of each view.

    Args:
        original: Features ``(view, token, channel)`` of any float type.
        decoded: Decoded features of the same shape.
        shape: Shape of one view's features; gives the number of prefix tokens.

    Returns:
        The errors ``raw``, ``spatial`` and ``frequency``, each float64 ``(view,)``.
    """
    if original.shape != decoded.shape:
        raise ValueError(f"{original.shape = } but {decoded.shape = }")
    before = np.asarray(original, np.float32)
    after = np.asarray(decoded, np.float32)
    # Scaled by the view's largest value, so that squares do not overflow in float32.
    largest = np.abs(before).max(axis=(1, 2), keepdims=True)
    scale = np.divide(1, largest, out=np.ones_like(largest), where=largest > 0)
    before, after = before * scale, after * scale
    difference = after - before
    energy = np.einsum("vtc,vtc->v", before, before, dtype=np.float64)
    squared = np.einsum("vtc,vtc->v", difference, difference, dtype=np.float64)
    raw = np.divide(squared, energy, out=np.where(squared > 0, np.inf, 0.0), where=energy > 0)
    patches = slice(shape.num_prefix_tokens, None)
    before, after = before[:, patches], after[:, patches]
    floor = _NEGLIGIBLE * np.sqrt(np.einsum("vtc,vtc->vt", before, before).max(axis=1))
    spatial = _unit_distance(before, after, floor)
    frequency = _unit_distance(
        before - before.mean(axis=1, keepdims=True),
        after - after.mean(axis=1, keepdims=True),
        floor,
    )
    return {"raw": raw, "spatial": spatial, "frequency": frequency}


def measure_errors(original: np.ndarray, decoded: np.ndarray, shape: FeatureShape) -> FeatureErrors:
    """Summarise :func:`view_errors` over all views."""
    return summarise([view_errors(original, decoded, shape)])


def summarise(blocks: Iterable[dict[str, np.ndarray]]) -> FeatureErrors:
    """Join the :func:`view_errors` of several blocks into one summary."""
    parts = list(blocks)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    summaries = {name: ErrorSummary.of(values) for name, values in joined.items()}
    return FeatureErrors(**summaries, num_views=len(joined["raw"]))


def _unit_distance(before: np.ndarray, after: np.ndarray, floor: np.ndarray) -> np.ndarray:
    first, second = _unit(before, floor), _unit(after, floor)
    difference = second - first
    squared = np.einsum("vtc,vtc->v", difference, difference, dtype=np.float64)
    return np.asarray(squared / before.shape[1])


def _unit(vectors: np.ndarray, floor: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.einsum("vtc,vtc->vt", vectors, vectors))
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > floor[:, None])
    return np.asarray(vectors * inverse[..., None])
