"""The filter without antialiasing, against OpenCV and against the filters that have it."""

import numpy as np
import pytest
from PIL import Image

from scalekd.errors import UsageError
from scalekd.views import ViewParams, ViewPolicy, draw, pack_views, render, unpack_view
from scalekd.views._resize import resize


def resized(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    return np.asarray(resize(Image.fromarray(pixels), size, interpolation))


def grey(row: list[int]) -> np.ndarray:
    return np.repeat(np.array(row, np.uint8)[None, :, None], 3, axis=2)


def test_the_opencv_filter_reads_two_pixels_of_a_row_at_any_scale() -> None:
    # Centres of the two halves: between pixels 0 and 1 and between 2 and 3; at pixels 1 and 4.
    assert resized(grey([10, 20, 30, 50]), (1, 2), "bilinear-opencv")[0, :, 0].tolist() == [15, 40]
    spikes = grey([0, 200, 0, 0, 100, 0])
    assert resized(spikes, (1, 2), "bilinear-opencv")[0, :, 0].tolist() == [200, 100]
    assert resized(spikes, (1, 2), "bilinear")[0, :, 0].max() < 100  # averaged with its neighbours


def test_an_enlarged_border_repeats_the_outer_pixel() -> None:
    # Centres at -0.25, 0.25, 0.75 and 1.25 of two pixels.
    row = resized(grey([0, 80]), (1, 4), "bilinear-opencv")[0, :, 0]
    assert row.tolist() == [0, 20, 60, 80]


# cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR) of OpenCV 5.0.0.
PIXELS = (np.arange(5 * 7 * 3).reshape(5, 7, 3) * 37 % 256).astype(np.uint8)
SMALLER = [
    [[44, 81, 119], [207, 20, 57], [177, 214, 27], [115, 152, 189]],
    [[60, 97, 134], [222, 35, 72], [192, 229, 42], [130, 167, 204]],
    [[74, 111, 149], [87, 50, 87], [207, 95, 57], [145, 182, 113]],
]
LARGER_RED = [
    [0, 74, 160, 190, 77, 163, 107, 80, 154],
    [7, 80, 167, 196, 84, 170, 114, 87, 161],
    [14, 88, 175, 204, 91, 178, 121, 94, 168],
    [22, 96, 182, 211, 99, 185, 129, 102, 176],
    [29, 103, 161, 169, 106, 193, 137, 109, 183],
    [36, 110, 82, 26, 113, 199, 143, 116, 190],
]


def test_the_opencv_filter_equals_opencv_bit_for_bit() -> None:
    assert resized(PIXELS, (3, 4), "bilinear-opencv").tolist() == SMALLER
    assert resized(PIXELS, (6, 9), "bilinear-opencv")[..., 0].tolist() == LARGER_RED
    assert np.array_equal(resized(PIXELS, (5, 7), "bilinear-opencv"), PIXELS)


def drawn(policy: ViewPolicy, image: Image.Image) -> ViewParams:
    size = (image.height, image.width)
    return draw(policy, seed=3, key="a", pass_index=0, source_size=size, view_size=(24, 20))


@pytest.mark.parametrize("text", ["crop+flip", "center:0.8", "crop+rand-m9-n4-p1-inc1"])
def test_the_filter_changes_pixels_and_nothing_that_is_drawn(text: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    views = {}
    for name in ("bicubic", "bilinear", "bilinear-opencv"):
        policy = ViewPolicy.parse(text, interpolation=name)  # type: ignore[arg-type]
        assert ViewPolicy.from_config(policy.to_config()) == policy
        params = drawn(policy, image)
        columns = pack_views([params], policy)
        assert unpack_view(columns, 0, policy) == params
        views[name] = (params, render(image, params, view_size=(24, 20)))
    crops = {(params.geometry, params.steps) for params, _ in views.values()}
    assert len(crops) == 1
    pixels = [rendered for _, rendered in views.values()]
    assert not np.array_equal(pixels[0], pixels[1])
    # Noise keeps its contrast where nothing is averaged.
    assert pixels[2].std() > 1.2 * pixels[1].std() or "rand" in text


def test_an_unknown_filter_is_refused() -> None:
    with pytest.raises(UsageError, match="bicubic or bilinear or bilinear-opencv"):
        ViewPolicy.parse("crop", interpolation="nearest")  # type: ignore[arg-type]
