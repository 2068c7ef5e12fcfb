"""Small synthetic features that have, like real ones, a mean, smooth maps and strong channels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from scalekd.shapes import FeatureShape

MakeFeatures = Callable[..., np.ndarray]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_features() -> MakeFeatures:
    def make(shape: FeatureShape, views: int, seed: int = 0) -> np.ndarray:
        fixed = np.random.default_rng(1234)  # the "teacher": the same for every seed
        channels = shape.num_channels
        mixing = fixed.normal(size=(channels, channels)) / np.sqrt(channels)
        mixing *= (1 + np.arange(channels)) ** -0.7 * 3
        mean = fixed.normal(size=(shape.num_tokens, channels)) * 0.5
        rng = np.random.default_rng(seed)
        latent = rng.normal(size=(views, shape.num_tokens, channels))
        first = shape.num_prefix_tokens
        grid = latent[:, first:].reshape(views, *shape.grid, channels)
        for axis in (1, 2):  # neighbours are alike
            grid += 0.8 * np.roll(grid, 1, axis=axis)
        latent[:, first:] = grid.reshape(views, -1, channels)
        return (mean + latent @ mixing.T).astype(np.float16)

    return make
