"""Colour jitter: torchvision's distribution and pixels, from a stream of its own."""

import itertools
from collections import Counter
from statistics import mean

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional

from scalekd.errors import CacheCorrupt
from scalekd.views import (
    Adjustment,
    CropBox,
    ViewParams,
    ViewPolicy,
    draw,
    pack_views,
    render,
    unpack_view,
    view_columns,
)
from scalekd.views._random import view_words

THEIRS = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
    "hue": functional.adjust_hue,
}


def draw_many(text: str, count: int) -> list[ViewParams]:
    policy = ViewPolicy.parse(text)
    return [
        draw(policy, seed=5, key=f"k{i}", pass_index=0, source_size=(60, 80), view_size=(32, 32))
        for i in range(count)
    ]


def rendered(image: Image.Image, *steps: Adjustment) -> NDArray[np.uint8]:
    whole = ViewParams(
        geometry=CropBox(0, 0, image.height, image.width),
        steps=steps,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    return render(image, whole, view_size=(image.height, image.width))


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *itertools.product(("brightness", "contrast", "saturation"), (0.0, 0.6, 1.0, 1.4, 8.0)),
        *(("hue", factor) for factor in (-0.5, -0.1, -0.001, 0.0, 0.003, 0.1, 0.5)),
    ],
)
def test_an_adjustment_equals_torchvisions(image: Image.Image, name: str, factor: float) -> None:
    expected = np.asarray(THEIRS[name](image, factor))
    np.testing.assert_array_equal(rendered(image, Adjustment(name, factor)), expected)


def test_adjustments_apply_in_their_order(image: Image.Image) -> None:
    steps = [Adjustment("brightness", 1.75), Adjustment("contrast", 0.5), Adjustment("hue", 0.25)]
    pictures = set()
    for order in itertools.permutations(steps):
        expected = image
        for step in order:
            expected = THEIRS[step.name](expected, step.factor)
        pixels = rendered(image, *order)
        np.testing.assert_array_equal(pixels, np.asarray(expected))
        pictures.add(pixels.tobytes())
    assert len(pictures) > 3


def test_factors_and_orders_are_uniform() -> None:
    views = draw_many("center+jitter:0.4-0.2-2-0.1", 2400)
    low_high = {"brightness": (0.6, 1.4), "contrast": (0.8, 1.2), "saturation": (0.0, 3.0)}
    for name, (low, high) in {**low_high, "hue": (-0.1, 0.1)}.items():
        factors = [s.factor for v in views for s in v.of(Adjustment) if s.name == name]
        assert len(factors) == 2400
        span = high - low
        assert low - 2**-11 <= min(factors) < low + span / 100
        assert high - span / 100 < max(factors) <= high + 2**-11
        assert abs(mean(factors) - (low + high) / 2) < 4 * span / (12 * 2400) ** 0.5
        assert all(np.float16(factor) == factor for factor in factors)
    orders = Counter(tuple(step.name for step in view.of(Adjustment)) for view in views)
    assert len(orders) == 24
    assert all(60 < count < 140 for count in orders.values())  # 100 expected, standard error 10


def test_adjustments_of_strength_zero_are_omitted() -> None:
    """A hue shift of nothing would still move pixels: HSV in bytes loses some."""
    for view in draw_many("crop+jitter:0.4-0-0.3", 20):
        assert sorted(step.name for step in view.of(Adjustment)) == ["brightness", "saturation"]
    (view,) = draw_many("crop+jitter:0-0-0-0", 1)
    assert view.steps == ()


def test_jitter_does_not_change_draws_of_other_components() -> None:
    text = "crop+flip+rand-m9-n2-mstd0.5-inc1{}+erase:0.25"
    for old, new in zip(
        draw_many(text.format(""), 50), draw_many(text.format("+jitter:0.4"), 50), strict=True
    ):
        assert new.geometry == old.geometry
        assert [step for step in new.steps if not isinstance(step, Adjustment)] == [*old.steps]
        assert len(new.of(Adjustment)) == 3
        names = [type(step).__name__ for step in new.steps]
        assert sorted(names, key=["Mirror", "Operation", "Adjustment", "EraseBox"].index) == names


def test_jitter_has_its_own_random_stream() -> None:
    shared = view_words(5, "k0", 0, 200)
    own = view_words(5, "k0", 0, 5, component="jitter")
    assert not set(own) & set(shared)
    assert own != view_words(5, "k0", 0, 5, component="blur")
    assert own != view_words(6, "k0", 0, 5, component="jitter")
    assert own != view_words(5, "k0", 1, 5, component="jitter")
    assert own != view_words(5, "k1", 0, 5, component="jitter")


FROZEN = (
    Adjustment("brightness", 0.9404296875),
    Adjustment("hue", -0.0804443359375),
    Adjustment("saturation", 1.1904296875),
    Adjustment("contrast", 1.126953125),
)


def _place(step: Adjustment) -> int:
    return list(THEIRS).index(step.name)


def test_one_jittered_view_equals_its_recorded_parameters() -> None:
    """Frozen on the day that jitter was added: caches that have it must replay."""
    (view,) = draw_many("crop+jitter:0.4-0.4-0.4-0.1", 1)
    assert view.of(Adjustment) == FROZEN
    columns = pack_views([view], ViewPolicy.parse("crop+jitter:0.4-0.4-0.4-0.1"))
    assert columns["jitter"].tolist() == [[step.factor for step in sorted(FROZEN, key=_place)]]
    assert columns["jitter_order"].tolist() == [5]  # b c s h, b c h s, b s c h, b s h c, b h c s


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("jitter", (1.5, 1.0), "outside"),
        ("jitter", (1.0, float("nan")), "saturation takes|outside"),
        ("jitter", (-0.1, 1.0), "outside"),
        ("jitter", (0.5, 1.0), "outside"),
        ("jitter_order", 2, "have no order 2"),
    ],
)
def test_a_damaged_number_is_named(column: str, value: object, found: str) -> None:
    policy = ViewPolicy.parse("center+jitter:0.4-0-0.4")
    columns = pack_views(draw_many(str(policy), 2), policy)
    columns[column][1] = value
    unpack_view(columns, 0, policy)
    with pytest.raises(CacheCorrupt, match=rf"view 1 are damaged.*({found})"):
        unpack_view(columns, 1, policy)


def test_views_without_jitter_have_no_such_column() -> None:
    plain = ViewPolicy.parse("crop+flip+rand-m9+jitter:0+erase:0.25")
    assert [*view_columns(plain)] == [
        "crop",
        "flip",
        "operations",
        "arguments",
        "erase",
        "noise_seed",
    ]
    assert str(plain) == "crop+flip+rand-m9-n2+erase:0.25"
    jitter = view_columns(ViewPolicy.parse("center+jitter:0.4-0.1-0-0.1"))
    assert jitter == {"jitter": (np.dtype("<f2"), (3,)), "jitter_order": (np.dtype("u1"), ())}
