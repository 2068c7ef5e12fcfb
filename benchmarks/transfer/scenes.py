"""Small scenes with masks: CIFAR-10 objects as ellipses on photographs.

The recipe is committed, not the data. A scene is drawn from its own seed, so it is the same for
every student. Its mask follows from the composition: class of the object in front, background
elsewhere. An ellipse contains some of the object's own surroundings, which count as the object.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SCENE_PX = 64
_OBJECTS = (1, 2)  # smallest and largest number of objects in a scene
_SIDES = (32, 48)  # smallest and largest side of an object, in pixels
_AXES = (0.8, 1.0)  # smallest and largest axis of an ellipse, as a share of its object's side


class Scenes(NamedTuple):
    """Scenes with their masks.

    Attributes:
        images: Pixels, uint8 ``(scene, row, column, 3)``.
        masks: Class of every pixel, uint8 ``(scene, row, column)``; 0 is the background.
    """

    images: np.ndarray
    masks: np.ndarray


def compose(
    objects: Sequence[Sequence[Path]], photographs: Sequence[Path], count: int, *, seed: int
) -> Scenes:
    """Compose ``count`` scenes.

    Args:
        objects: Files of the objects of each class; class ``c`` has the mask ``c + 1``.
        photographs: Files of the backgrounds.
        count: Number of scenes.
        seed: Seed of the scenes, which are ``(seed, 0)``, ``(seed, 1)`` and so on.
    """
    backgrounds = [_opened(path) for path in photographs]
    pairs = [
        _scene(objects, backgrounds, np.random.default_rng((seed, number)))
        for number in range(count)
    ]
    images, masks = zip(*pairs, strict=True)
    return Scenes(np.stack(images), np.stack(masks))


def _scene(
    objects: Sequence[Sequence[Path]], backgrounds: Sequence[Image.Image], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    pixels = _background(backgrounds[rng.integers(len(backgrounds))], rng)
    mask = np.zeros((SCENE_PX, SCENE_PX), np.uint8)
    for _ in range(rng.integers(_OBJECTS[0], _OBJECTS[1] + 1)):
        label = int(rng.integers(len(objects)))
        side = int(rng.integers(_SIDES[0], _SIDES[1] + 1))
        image = _opened(objects[label][rng.integers(len(objects[label]))])
        patch = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        patch = patch[:, ::-1] if rng.random() < 0.5 else patch
        top, left = rng.integers(0, SCENE_PX - side + 1, size=2)
        window = np.s_[top : top + side, left : left + side]
        inside = _ellipse(side, rng)
        pixels[window][inside] = patch[inside]
        mask[window][inside] = label + 1
    return pixels, mask


def _background(photograph: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Return a random square of a photograph, at most mirrored, at the size of a scene."""
    side = int(min(photograph.size) * rng.uniform(0.5, 1))
    left = int(rng.integers(0, photograph.width - side + 1))
    top = int(rng.integers(0, photograph.height - side + 1))
    box = (left, top, left + side, top + side)
    square = photograph.resize((SCENE_PX, SCENE_PX), Image.Resampling.BICUBIC, box=box)
    pixels = np.array(square)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels


def _ellipse(side: int, rng: np.random.Generator) -> np.ndarray:
    """Return the inside of an ellipse in the middle of a square, as booleans."""
    height, width = side / 2 * rng.uniform(*_AXES, size=2)
    offsets = np.arange(side) + 0.5 - side / 2
    inside: np.ndarray = (offsets[:, None] / height) ** 2 + (offsets[None] / width) ** 2 <= 1
    return inside


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
