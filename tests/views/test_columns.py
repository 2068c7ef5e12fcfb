"""Views as arrays: exact, small, and never silently wrong."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numcodecs import Zstd
from numpy.typing import NDArray
from PIL import Image

from scalekd.errors import CacheCorrupt
from scalekd.views import (
    OPERATIONS,
    CropBox,
    EraseBox,
    Mirror,
    Operation,
    ViewParams,
    ViewPolicy,
    draw,
    pack_views,
    pixel_hash,
    render,
    unpack_view,
    view_columns,
)

FULL = ViewPolicy.parse("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25")
POLICIES = (
    "crop",
    "crop-flip",
    "crop:0.25..1+flip:1",
    "center",
    "center:0.9+flip",
    "crop+rand-m9-n2-mstd0.5-inc1",
    "crop+flip+rand-m15-n16-p1-mmax30",
    "crop+erase:1",
    "crop+jitter:0.4",
    "center+flip+jitter:0.8-0-0.3-0.2+erase:0.5",
    str(FULL),
)


def draw_many(policy: ViewPolicy, count: int, sources: list[tuple[int, int]]) -> list[ViewParams]:
    return [
        draw(
            policy,
            seed=11,
            key=f"sample/{i}",
            pass_index=0,
            source_size=sources[i % len(sources)],
            view_size=(224, 224),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("text", POLICIES)
def test_a_view_read_from_compressed_bytes_has_identical_pixels(
    image: Image.Image, text: str
) -> None:
    policy = ViewPolicy.parse(text)
    views = draw_many(policy, 12, [(image.height, image.width)])
    first = [pixel_hash(render(image, view, view_size=(224, 224))) for view in views]
    zstd = Zstd(level=9)
    columns: dict[str, NDArray[Any]] = {}
    for name, packed in pack_views(views, policy).items():
        dtype, shape = view_columns(policy)[name]
        assert packed.dtype == dtype
        assert packed.shape == (12, *shape)
        stored = zstd.decode(zstd.encode(packed.tobytes()))
        columns[name] = np.frombuffer(stored, dtype).reshape(12, *shape)
    again_policy = ViewPolicy.from_config(policy.to_config())
    for row in reversed(range(12)):
        view = unpack_view(columns, row, again_policy)
        assert view == views[row]
        assert pixel_hash(render(image, view, view_size=(224, 224))) == first[row]
    assert len(set(first)) > 1 or policy.deterministic


@st.composite
def boxes(draw_: st.DrawFn, limit: int) -> tuple[int, int, int, int]:
    top, left = draw_(st.integers(0, limit - 1)), draw_(st.integers(0, limit - 1))
    height = draw_(st.integers(1, min(limit - top, 65535)))
    return (top, left, height, draw_(st.integers(1, min(limit - left, 65535))))


@st.composite
def operations(draw_: st.DrawFn) -> Operation:
    name = draw_(st.sampled_from(sorted(OPERATIONS)))
    limits = OPERATIONS[name]
    if limits.whole:
        return Operation(name, draw_(st.integers(int(limits.low), int(limits.high))))
    return Operation(name, draw_(st.floats(limits.low, limits.high, width=16)))


views = st.builds(
    lambda crop, flip, operations, erase, seed: ViewParams(
        geometry=CropBox(*crop),
        steps=(
            *([Mirror()] if flip else []),
            *operations,
            *([EraseBox(*erase, noise_seed=seed)] if erase else []),
        ),
        interpolation=FULL.interpolation,
        mean=FULL.mean,
        std=FULL.std,
    ),
    boxes(65535),
    st.booleans(),
    st.lists(operations(), max_size=2),
    st.none() | boxes(65536),
    st.integers(0, 2**32 - 1),
)


@given(st.lists(views, max_size=5))
def test_any_view_of_the_policy_round_trips(originals: list[ViewParams]) -> None:
    columns = pack_views(originals, FULL)
    assert [unpack_view(columns, row, FULL) for row in range(len(originals))] == originals


@given(
    st.fixed_dictionaries(
        {
            name: arrays.arrays(dtype, (1, *shape))
            for name, (dtype, shape) in view_columns(FULL).items()
        }
    )
)
@settings(max_examples=300)
def test_damaged_rows_are_refused_or_are_views_that_pack_to_the_same_bytes(
    columns: dict[str, NDArray[Any]],
) -> None:
    try:
        view = unpack_view(columns, 0, FULL)
    except CacheCorrupt:
        return
    for name, packed in pack_views([view], FULL).items():
        np.testing.assert_array_equal(packed, columns[name])


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("crop", (0, 0, 0, 5), "not a box inside an image"),
        ("crop", (65535, 0, 1, 5), "not a box inside an image"),
        ("flip", 2, "flip is 2"),
        ("operations", (16, 0), "number 16"),
        ("operations", (0, 4), "leave gaps"),
        ("arguments", (float("nan"), 0), "rotate takes"),
        ("arguments", (9, 9), "leave gaps"),
        ("erase", (0, 0, 0, 9), "not a box inside a view"),
        ("noise_seed", 3, "noise without"),
    ],
)
def test_a_damaged_number_is_named(column: str, value: object, found: str) -> None:
    view = ViewParams(
        geometry=CropBox(1, 2, 3, 4),
        steps=(Mirror(), Operation("rotate", 4.5)),
        interpolation=FULL.interpolation,
        mean=FULL.mean,
        std=FULL.std,
    )
    columns = pack_views([view, view, view], FULL)
    columns[column][1] = value
    assert unpack_view(columns, 0, FULL) == unpack_view(columns, 2, FULL) == view
    with pytest.raises(CacheCorrupt, match=r"view 1 are damaged.*" + found):
        unpack_view(columns, 1, FULL)


def test_packing_with_the_wrong_policy_is_refused_rather_than_lossy() -> None:
    erased = draw_many(ViewPolicy.parse("crop+flip+erase:1"), 3, [(50, 50)])
    for text in ("crop+flip", "crop:0.1..1+flip:0+erase:1", "center", "crop+flip:1+erase:1"):
        with pytest.raises(ValueError, match="is not a view of"):
            pack_views(erased, ViewPolicy.parse(text))
    many = draw_many(ViewPolicy.parse("crop+rand-n3-p1"), 3, [(50, 50)])
    with pytest.raises(ValueError, match="is not a view of"):
        pack_views(many, ViewPolicy.parse("crop+rand-n2-p1"))
    bilinear = ViewPolicy.parse("crop+flip+erase:1", interpolation="bilinear")
    with pytest.raises(ValueError, match="is not a view of"):
        pack_views(erased, bilinear)


def test_a_deterministic_policy_has_no_columns() -> None:
    policy = ViewPolicy.parse("center")
    assert view_columns(policy) == {}
    (view,) = draw_many(policy, 1, [(50, 50)])
    assert unpack_view({}, 0, policy) == view


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("center", 0),
        ("crop-flip", 7),
        ("crop+flip+rand-m9-n2-mstd0.5-inc1", 11),
        (str(FULL), 15),
    ],
)
def test_compressed_columns_take_few_bytes_per_view(text: str, limit: float) -> None:
    policy = ViewPolicy.parse(text)
    sources = [(375, 500), (333, 500), (500, 375), (500, 500), (480, 640)]  # as ImageNet has
    columns = pack_views(draw_many(policy, 1024, sources), policy)
    zstd = Zstd(level=9)
    stored = sum(
        len(zstd.encode(column[start : start + 256].tobytes()))
        for column in columns.values()
        for start in range(0, 1024, 256)
    )
    assert stored / 1024 <= limit
