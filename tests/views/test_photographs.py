"""Real photographs, through the whole path, and against timm."""

import random
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_transform

from scalekd.views import (
    ViewPolicy,
    decode_image,
    draw,
    pack_views,
    pixel_hash,
    render,
    unpack_view,
)


def test_every_photograph_replays_to_the_bit(photographs: list[Path]) -> None:
    policy = ViewPolicy.parse("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25")
    views, hashes = [], []
    for path in photographs:
        image = decode_image(path.read_bytes(), key=path.stem)
        view = draw(
            policy,
            seed=0,
            key=path.stem,
            pass_index=0,
            source_size=(image.height, image.width),
            view_size=(224, 224),
        )
        views.append(view)
        hashes.append(pixel_hash(render(image, view, view_size=(224, 224))))
    columns = pack_views(views, policy)
    order = random.Random(1).sample(range(len(photographs)), len(photographs))
    for row in order:
        path = photographs[row]
        image = decode_image(path.read_bytes(), key=path.stem)
        pixels = render(image, unpack_view(columns, row, policy), view_size=(224, 224))
        assert pixel_hash(pixels) == hashes[row]
    assert len(set(hashes)) == len(hashes)


def test_a_photograph_looks_as_timm_loads_it(photographs: list[Path]) -> None:
    transform = create_transform(224, interpolation="bicubic", crop_pct=0.875, normalize=False)
    policy = ViewPolicy.parse("center:0.875")
    for path in photographs[:20]:
        image = decode_image(path.read_bytes(), key=path.stem)
        with Image.open(path) as opened:
            expected = transform(opened.convert("RGB")).numpy().transpose(1, 2, 0)
        view = draw(
            policy,
            seed=0,
            key=path.stem,
            pass_index=0,
            source_size=(image.height, image.width),
            view_size=(224, 224),
        )
        np.testing.assert_array_equal(render(image, view, view_size=(224, 224)), expected)
