"""The shape of one view's features at one stage, and the type of arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = np.ndarray[Any, Any]
"""A NumPy array of any element type, whose rows are samples or views."""


@dataclass(frozen=True)
class FeatureShape:
    """Shape of features ``(token, channel)``: prefix tokens first, then the grid row by row.

    Attributes:
        grid: Number of rows and columns of patch tokens.
        num_channels: Number of channels of a token.
        num_prefix_tokens: Number of class, distillation and register tokens before the patch
            tokens.
    """

    grid: tuple[int, int]
    num_channels: int
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or self.num_channels < 1 or self.num_prefix_tokens < 0:
            raise ValueError(f"not a feature shape: {self!r}")

    @property
    def num_patch_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patch_tokens
