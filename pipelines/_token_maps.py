"""Pictures of token grids: principal components as colours, and errors as heat."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from PIL import Image

Rows = np.ndarray[Any, Any]

_MAX_TOKENS = 20_000  # tokens that the components are fitted to
_HEAT = ((24, 28, 60), (120, 40, 110), (220, 80, 60), (250, 180, 60), (255, 250, 210))
"""Colours of errors, from none to the largest."""


@dataclass(frozen=True)
class ColourBasis:
    """First three principal components of unit-normalised tokens, as red, green and blue.

    Attributes:
        mean: Mean of the tokens, ``(channel,)``.
        components: Principal components, ``(channel, 3)``.
        low: Value of each component that is shown as 0.
        high: Value of each component that is shown as 255.
    """

    mean: Rows
    components: Rows
    low: Rows
    high: Rows

    @classmethod
    def fit(cls, views: Sequence[Rows]) -> Self:
        """Fit the components to the patch tokens of several views.

        Args:
            views: Arrays ``(token, channel)`` of one stage.
        """
        tokens = _unit(np.concatenate(views))
        tokens = tokens[:: max(1, len(tokens) // _MAX_TOKENS)]
        mean = tokens.mean(axis=0)
        centred = tokens - mean
        _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
        count = min(3, vectors.shape[1])
        components = np.zeros((vectors.shape[0], 3), np.float32)
        components[:, :count] = vectors[:, ::-1][:, :count]
        # The sign of a component is arbitrary; a fixed one gives the same page on every machine.
        largest = np.abs(components).argmax(axis=0)
        components *= np.where(components[largest, range(3)] < 0, -1, 1)
        low, high = np.percentile(centred @ components, (2, 98), axis=0)
        return cls(mean, components, low, np.maximum(high, low + 1e-9))

    def colours(self, tokens: Rows, grid: tuple[int, int]) -> Rows:
        """Return the colours of one view's patch tokens, uint8 ``(height, width, 3)``."""
        values = (_unit(tokens) - self.mean) @ self.components
        scaled = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        return np.asarray(np.rint(255 * scaled).astype(np.uint8).reshape(*grid, 3))


def token_errors(stored: Rows, live: Rows) -> Rows:
    """Return the squared distance of each decoded token, relative to its squared length."""
    energy = np.maximum(np.square(live, dtype=np.float64).sum(axis=-1), 1e-12)
    difference = np.subtract(stored, live, dtype=np.float64)
    return np.asarray(np.square(difference).sum(axis=-1) / energy)


def heat(errors: Rows, largest: float, grid: tuple[int, int]) -> Rows:
    """Return errors as colours, uint8 ``(height, width, 3)``; ``largest`` has the last colour."""
    scale = np.clip(errors / max(largest, 1e-12), 0, 1) * (len(_HEAT) - 1)
    colours = np.array(_HEAT, np.float64)
    channels = [np.interp(scale, range(len(_HEAT)), colours[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8).reshape(*grid, 3)


def png(pixels: Rows) -> str:
    """Return an image as a ``data:`` address in a lossless format."""
    return _address(Image.fromarray(pixels), "PNG", optimize=True)


def thumbnail(image: Image.Image, side: int) -> str:
    """Return a copy with at most ``side`` pixels a side as a ``data:`` address."""
    small = image.copy()
    small.thumbnail((side, side))
    return _address(small, "JPEG", quality=82)


def _address(image: Image.Image, kind: str, **settings: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _unit(tokens: Rows) -> Rows:
    lengths = np.linalg.norm(tokens, axis=-1, keepdims=True)
    return np.asarray(tokens / np.maximum(lengths, 1e-12))
