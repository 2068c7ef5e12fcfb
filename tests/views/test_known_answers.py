"""Views that must never change: frozen on the day that version 1 was made.

A failure here means that caches written before no longer replay. If the code changed, undo it or
raise ``POLICY_VERSION``. If only Pillow, libjpeg or the processor changed, that is the drift which
a cache's pixel hashes are there to stop, and the supported versions in pyproject need a limit.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalekd.views import (
    CropBox,
    EraseBox,
    Operation,
    ViewParams,
    ViewPolicy,
    decode_image,
    draw,
    pack_views,
    pixel_hash,
    render,
)
from scalekd.views._random import exponential, noise_table, noise_words, normal, view_words

FROZEN = Path(__file__).parent / "frozen"

# Policy, SHA-256 of 32 packed views, SHA-256 of their 32 pixel hashes (first 16 digits each).
ANSWERS = [
    ("crop", "403cebe6f729904b", "8fe6e569fe924dc7"),
    ("crop-flip", "5bcd586082f23df2", "9a7a164c599d2968"),
    ("center", "e3b0c44298fc1c14", "77e59d724307999e"),
    ("crop+flip+rand-m9-n2-mstd0.5-inc1", "f79f981a4a61e591", "c21fdb332fd41472"),
    ("crop:0.3..1+rand-m12-n4-p1-mmax15", "251dfb4c00930c9b", "22b9696d17c8e182"),
    ("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25", "b196100c9938f039", "73463dbb64410171"),
    ("center:0.9+erase:1", "fda3d78e7250d48d", "dfa99cb18fd16332"),
    ("crop+flip+jitter:0.4", "29d72e11b376e1a2", "132e457f5d73c8dd"),
    (
        "crop+flip+rand-m9-n2-mstd0.5-inc1+jitter:0.4-0.4-0.2-0.1+erase:0.25",
        "146d89f4503f93c1",
        "0b2e85691e5e313c",
    ),
]


def arithmetic_image(height: int, width: int) -> Image.Image:
    values = bytes(
        (3 * x * x + 5 * y * y + x * y + 64 * c + 90 * ((x // 8 + y // 8) % 2)) % 256
        if c < 2
        else (4 * x + 2 * y) % 256
        for y in range(height)
        for x in range(width)
        for c in range(3)
    )
    return Image.frombytes("RGB", (width, height), values)


def short_sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@pytest.mark.parametrize(("text", "packed", "pixels"), ANSWERS)
def test_draws_and_pixels_equal_the_recorded_ones(text: str, packed: str, pixels: str) -> None:
    image, policy = arithmetic_image(61, 83), ViewPolicy.parse(text)
    views = [
        draw(
            policy,
            seed=2024,
            key=f"n01440764/{i}",
            pass_index=i % 3,
            source_size=(61, 83),
            view_size=(48, 56),
        )
        for i in range(32)
    ]
    columns = sorted(pack_views(views, policy).items())
    assert short_sha256(*(name.encode() + array.tobytes() for name, array in columns)) == packed
    hashes = [pixel_hash(render(image, view, view_size=(48, 56))) for view in views]
    assert short_sha256(*(value.to_bytes(8, "big") for value in hashes)) == pixels


def test_one_view_equals_its_recorded_parameters() -> None:
    view = draw(
        ViewPolicy.parse("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25"),
        seed=2024,
        key="n01440764/7",
        pass_index=0,
        source_size=(375, 500),
        view_size=(224, 224),
    )
    assert view == ViewParams(
        geometry=CropBox(top=4, left=33, height=366, width=453),
        steps=(
            Operation("rotate", -27.296875),
            Operation("equalize", 0.0),
            EraseBox(top=48896, left=0, height=13824, width=8704, noise_seed=910722369),
        ),
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("picture.png", 0x580A869C672F348), ("picture.jpg", 0x78A4D23498AA77ED)],
)
def test_decoded_files_equal_the_recorded_ones(name: str, expected: int) -> None:
    """The JPEG has halved chroma, so its upsampling is fixed here too."""
    decoded = decode_image((FROZEN / name).read_bytes(), key=name)
    assert decoded.size == (32, 24)
    assert pixel_hash(np.asarray(decoded)) == expected


def test_the_hash_of_known_bytes_equals_the_recorded_one() -> None:
    assert pixel_hash(np.zeros((0, 1, 3), np.uint8)) == 0x2D06800538D394C2  # of nothing, published
    assert pixel_hash(np.asarray(arithmetic_image(61, 83))) == 0x7E08A641AECE1DF3


def test_random_numbers_and_tables_equal_the_recorded_ones() -> None:
    assert view_words(1, "a", 2, 2) == [0xB5325B4F78137EC6, 0x7FAE6C083FA76386]
    own = view_words(1, "a", 2, 2, component="jitter")
    assert own == [0x96E343EA91ABD2E5, 0x2369C0A1895FDC85]
    assert noise_words(7, 6).tolist() == [41819, 10279, 53598, 63758, 34383, 1628]
    normals = np.array([normal(i << 48) for i in range(65536)], "<f8")
    assert short_sha256(normals.tobytes()) == "809d53a690a2d233"
    assert short_sha256(noise_table(0.485, 0.229).tobytes()) == "24a485d5eaa35cb5"
    exponentials = np.array([exponential(i / 256) for i in range(-320, 321)], "<f8")
    assert short_sha256(exponentials.tobytes()) == "85a69b8e2e7849be"


def test_tables_have_their_distributions() -> None:
    normals = np.array([normal(i << 48) for i in range(65536)])
    assert abs(normals.mean()) < 1e-6
    assert abs(normals.std() - 1) < 1e-4
    assert (np.diff(normals) >= 0).all()
    for i in range(-320, 321):
        assert exponential(i / 256) == pytest.approx(np.exp(i / 256), rel=1e-15)
    assert noise_table(0.485, 0.229).shape == (65536,)
    assert noise_table(0.485, 0.229)[32768] == 124  # the median is the mean, 0.485 * 255 = 123.7
