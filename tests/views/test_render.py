"""Pixels of a view: the same at every replay, timm's where timm has them."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional

from scalekd.errors import DataError
from scalekd.views import (
    Adjustment,
    CropBox,
    EraseBox,
    Middle,
    Mirror,
    Operation,
    ViewParams,
    ViewPolicy,
    draw,
    mean_difference,
    pixel_hash,
    render,
)

Maker = Callable[[int, int], Image.Image]
PLAIN = ViewParams(
    geometry=CropBox(10, 20, 60, 80),
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def test_a_crop_is_torchvisions_resized_crop(image: Image.Image) -> None:
    expected = functional.resized_crop(
        image, 10, 20, 60, 80, [56, 48], functional.InterpolationMode.BICUBIC
    )
    np.testing.assert_array_equal(render(image, PLAIN, view_size=(56, 48)), np.asarray(expected))


def test_columns_are_resized_before_rows_whatever_pillow_prefers(make_image: Maker) -> None:
    """Pillow 13 does rows first in tall images, and a bicubic pixel moves by up to 20."""
    image = make_image(300, 70)
    view = replace(PLAIN, geometry=CropBox(0, 0, 300, 70))
    narrow = image.resize((64, 300), Image.Resampling.BICUBIC)
    expected = np.asarray(narrow.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(render(image, view, view_size=(64, 64)), expected)
    short = image.resize((70, 64), Image.Resampling.BICUBIC)
    other = np.asarray(short.resize((64, 64), Image.Resampling.BICUBIC))
    assert (other != expected).any(), "the order matters, so this test would notice"


def test_pixels_outside_the_crop_have_no_effect(image: Image.Image) -> None:
    inside = Image.new("RGB", image.size)
    inside.paste(image.crop((20, 10, 100, 70)), (20, 10))
    np.testing.assert_array_equal(
        render(image, PLAIN, view_size=(32, 32)), render(inside, PLAIN, view_size=(32, 32))
    )


def test_a_flip_mirrors_before_the_operations(image: Image.Image) -> None:
    flipped = render(image, replace(PLAIN, steps=(Mirror(),)), view_size=(48, 40))
    np.testing.assert_array_equal(flipped, render(image, PLAIN, view_size=(48, 40))[:, ::-1])
    moved = replace(PLAIN, steps=(Mirror(), Operation("translate_x", 0.5)))
    drawn = render(image, moved, view_size=(48, 40))
    np.testing.assert_array_equal(drawn[:, :20], flipped[:, 20:])
    assert (drawn[:, 20:] == [124, 116, 104]).all()


def test_interpolation_changes_pixels(image: Image.Image) -> None:
    other = render(image, replace(PLAIN, interpolation="bilinear"), view_size=(48, 48))
    assert (other != render(image, PLAIN, view_size=(48, 48))).any()


@pytest.mark.parametrize("fraction", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("source", [(97, 121), (121, 97), (64, 64), (20, 300), (256, 200)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_a_centre_view_is_timms_evaluation_view(
    make_image: Maker,
    source: tuple[int, int],
    size: tuple[int, int],
    interpolation: str,
    fraction: float,
) -> None:
    image = make_image(*source)
    policy = ViewPolicy.parse(f"center:{fraction}", interpolation=interpolation)  # type: ignore[arg-type]
    view = draw(policy, seed=0, key="a", pass_index=0, source_size=source, view_size=size)
    transform = create_transform(
        size, interpolation=interpolation, crop_pct=fraction, normalize=False
    )
    expected = transform(image).numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(render(image, view, view_size=size), expected)


@pytest.mark.parametrize(
    ("size", "fraction", "message"),
    [
        ((1, 60_000), 0.875, "more than 89,478,485 pixels"),
        ((64, 64), 1e-320, "more than 65,535 px"),
    ],
)
def test_a_centre_view_takes_bounded_memory(
    size: tuple[int, int], fraction: float, message: str
) -> None:
    """A strip one pixel wide would be resized to 256 x 15 million."""
    view = replace(PLAIN, geometry=Middle(fraction))
    with pytest.raises(DataError, match=message):
        render(Image.new("RGB", size), view, view_size=(224, 224))


def test_rendering_returns_a_new_array_and_does_not_change_the_image(image: Image.Image) -> None:
    before = image.tobytes()
    whole = replace(PLAIN, geometry=CropBox(0, 0, image.height, image.width))
    for view in (whole, replace(whole, steps=(EraseBox(0, 0, 9000, 9000, 0),))):
        pixels = render(image, view, view_size=(image.height, image.width))
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous
        assert pixels.dtype == np.uint8
        pixels[:] = 0
    assert image.tobytes() == before


def test_only_the_erased_box_changes(image: Image.Image) -> None:
    # 16,384 and 32,768 of 65,536: from row 16, column 32, a box of 32 rows and 16 columns.
    view = replace(PLAIN, steps=(EraseBox(16384, 32768, 32768, 16384, noise_seed=5),))
    changed = render(image, view, view_size=(64, 64)) != render(image, PLAIN, view_size=(64, 64))
    rows, columns = np.nonzero(changed.any(axis=-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 47, 32, 47)
    assert changed[16:48, 32:48].mean() > 0.98


def test_noise_is_a_normalised_gaussian_rounded_to_pixels(image: Image.Image) -> None:
    view = replace(PLAIN, steps=(EraseBox(0, 0, 65535, 65535, noise_seed=1),))
    noise = render(image, view, view_size=(256, 256)).reshape(-1, 3)
    rng = np.random.default_rng(0)
    values = 255 * (np.array(view.mean) + np.array(view.std) * rng.standard_normal((65536, 3)))
    expected = np.clip(np.round(values), 0, 255)
    for channel in range(3):
        # Distribution functions of two samples of 65,536: differences beyond 0.01 have p < 0.003.
        ours, theirs = (
            np.searchsorted(np.sort(sample[:, channel]), np.arange(256), side="right") / 65536
            for sample in (noise, expected)
        )
        assert np.abs(ours - theirs).max() < 0.01
    correlation = np.corrcoef(noise.T)
    assert np.abs(correlation - np.eye(3)).max() < 0.02
    neighbours = np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]
    assert abs(neighbours) < 0.02


def test_another_noise_seed_gives_other_noise(image: Image.Image) -> None:
    view = replace(PLAIN, steps=(EraseBox(0, 0, 65535, 65535, noise_seed=1),))
    first = render(image, view, view_size=(32, 32))
    second = render(
        image,
        replace(view, steps=(EraseBox(0, 0, 65535, 65535, noise_seed=2),)),
        view_size=(32, 32),
    )
    assert (first != second).mean() > 0.95


@pytest.mark.parametrize("side", [7, 32, 112, 200, 224, 256, 257, 384, 1000])
def test_a_drawn_box_covers_whole_pixels_at_the_size_it_was_drawn_for(side: int) -> None:
    policy = ViewPolicy.parse("crop+erase:1")
    size = (side, side + 3)
    for pass_index in range(40 if side < 300 else 4):
        view = draw(
            policy, seed=3, key="a", pass_index=pass_index, source_size=(9, 9), view_size=size
        )
        (box,) = view.of(EraseBox)
        black = Image.new("RGB", (9, 9))
        noisy = render(black, view, view_size=size).any(axis=-1)
        top, left, height, width = (
            edge * whole / 65536 for edge, whole in zip(box[:4], size * 2, strict=True)
        )
        expected = np.zeros(size, bool)
        expected[
            round(top) : round(top) + round(height), round(left) : round(left) + round(width)
        ] = True
        # Noise is black in all three channels once in 10**5 pixels.
        assert not (noisy & ~expected).any()
        assert (noisy == expected).mean() > 0.999


def test_geometry_is_relative_so_another_size_shows_the_same_part(make_image: Maker) -> None:
    image = make_image(200, 300)
    policy = ViewPolicy.parse("crop:0.3..1+flip+rand-m9-n2-mstd0.5-inc1")
    for pass_index in range(20):
        view = draw(
            policy,
            seed=0,
            key="a",
            pass_index=pass_index,
            source_size=(200, 300),
            view_size=(224, 224),
        )
        smaller, larger = (render(image, view, view_size=(n, n)) for n in (112, 448))
        reduced = np.asarray(Image.fromarray(larger).resize((112, 112), Image.Resampling.BOX))
        # Filters of different reach, and posterize or solarize after them, move single pixels.
        assert mean_difference(smaller, reduced) < 25
        wrong = np.asarray(Image.fromarray(larger[:, ::-1]).resize((112, 112)))
        assert mean_difference(smaller, wrong) > mean_difference(smaller, reduced)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (500, 2)])
@pytest.mark.parametrize("source", [(1, 1), (1, 300), (300, 1), (2, 2)])
def test_tiny_images_and_tiny_views_are_rendered(
    make_image: Maker, source: tuple[int, int], size: tuple[int, int]
) -> None:
    image = make_image(*source)
    policy = ViewPolicy.parse("crop+flip+rand-m9-n4-p1-mstd0.5-inc1+erase:1")
    for pass_index in range(8):
        view = draw(
            policy, seed=0, key="a", pass_index=pass_index, source_size=source, view_size=(8, 8)
        )
        assert render(image, view, view_size=size).shape == (*size, 3)


def test_a_box_outside_the_image_is_an_error_and_not_padded(
    make_image: Maker,
) -> None:
    for size in ((69, 100), (70, 99)):
        with pytest.raises(DataError, match="another image of that key"):
            render(make_image(*size), PLAIN, view_size=(32, 32))
    assert render(make_image(70, 100), PLAIN, view_size=(32, 32)).shape == (32, 32, 3)


def test_other_modes_and_impossible_sizes_are_refused(image: Image.Image) -> None:
    with pytest.raises(ValueError, match="RGB images, not L"):
        render(image.convert("L"), PLAIN, view_size=(32, 32))
    with pytest.raises(ValueError, match="sides must be in"):
        render(image, PLAIN, view_size=(32, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"geometry": CropBox(0, 0, 0, 5)},
        {"geometry": CropBox(-1, 0, 5, 5)},
        {"geometry": CropBox(65535, 0, 1, 5)},
        {"geometry": Middle(1.5)},
        {"geometry": Middle(float("nan"))},
        {"steps": (EraseBox(0, 0, 0, 0, 0),)},
        {"steps": (EraseBox(65535, 0, 2, 1, 0),)},
        {"steps": (EraseBox(0, 0, 65536, 1, 0),)},
        {"steps": (EraseBox(0, 0, 9, 9, 2**32),)},
        {"steps": (Operation("blur"),)},
        {"steps": (Mirror(), Adjustment("hue", 0.6))},
        {"steps": (Adjustment("gamma", 1.0),)},
    ],
)
def test_parameters_that_no_draw_gives_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        replace(PLAIN, **change)  # type: ignore[arg-type]


def test_one_bit_of_one_pixel_changes_the_hash(image: Image.Image) -> None:
    pixels = render(image, PLAIN, view_size=(24, 24))
    hashes = {pixel_hash(pixels)}
    for place in ((0, 0, 0), (11, 7, 1), (23, 23, 2)):
        pixels[place] ^= 1
        hashes.add(pixel_hash(pixels))
        pixels[place] ^= 1
    assert len(hashes) == 4
    assert pixel_hash(pixels) in hashes
    assert all(0 <= value < 2**64 for value in hashes)


def test_the_hash_is_of_the_rows_whatever_the_memory_layout(image: Image.Image) -> None:
    pixels = render(image, PLAIN, view_size=(24, 20))
    assert pixel_hash(np.asfortranarray(pixels)) == pixel_hash(pixels)
    assert pixel_hash(pixels[:, ::-1]) != pixel_hash(pixels)
    with pytest.raises(ValueError, match="uint8"):
        pixel_hash(pixels.astype(np.float32))  # type: ignore[arg-type]


def test_mean_difference_is_in_pixel_steps() -> None:
    first = np.zeros((2, 2, 3), np.uint8)
    second = first.copy()
    second[0, 0] = 255
    assert mean_difference(first, second) == mean_difference(second, first) == 255 / 4
    with pytest.raises(ValueError, match="cannot be compared"):
        mean_difference(first, second[:1])


def test_drawing_and_cropping_need_no_torch() -> None:
    code = """
import sys
from PIL import Image
from scalekd.views import *
policy = ViewPolicy.parse("crop+flip+rand-m9+jitter:1-1-1-0.5+erase:1")
view = draw(policy, seed=0, key="a", pass_index=0,
            source_size=(9, 9), view_size=(8, 8))
view = draw(ViewPolicy.parse("crop+flip+jitter:1-1-1-0.5"), seed=0, key="a", pass_index=0,
            source_size=(9, 9), view_size=(8, 8))
render(Image.new("RGB", (9, 9)), view, view_size=(8, 8))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
