"""Images made by arithmetic, so that every machine has the same ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"


def _make_image(height: int, width: int) -> Image.Image:
    """Smooth shading with fine texture and a hard edge: every operation has something to change."""
    y, x = np.mgrid[:height, :width]
    red = 40 + 2 * x % 160 + (x * y) % 13
    green = 200 - (y * 180) // max(height, 1) + (7 * x + 3 * y) % 11
    blue = np.where((x // 16 + y // 16) % 2, 215, 25) + (x * x + y) % 17
    return Image.fromarray(np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def image() -> Image.Image:
    return _make_image(97, 121)


@pytest.fixture(scope="session")
def make_image() -> Callable[[int, int], Image.Image]:
    return _make_image


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    paths = sorted(PHOTOGRAPHS.glob("*.JPEG"))
    if not paths:
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    return paths
