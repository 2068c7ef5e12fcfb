"""Draws: independent of everything but (seed, key, pass), and distributed as timm's."""

import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, stdev

import pytest
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from scalekd.errors import UsageError
from scalekd.views import (
    OPERATIONS,
    CropBox,
    EraseBox,
    Flip,
    Mirror,
    Operation,
    RandAugment,
    ViewParams,
    ViewPolicy,
    draw,
)

FULL = ViewPolicy.parse("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25")
SOURCE = (375, 500)


def draw_many(policy: ViewPolicy, count: int, source: tuple[int, int] = SOURCE) -> list[ViewParams]:
    return [
        draw(policy, seed=0, key=f"k{i}", pass_index=0, source_size=source, view_size=(224, 224))
        for i in range(count)
    ]


def test_a_draw_depends_on_no_order_and_no_thread() -> None:
    expected = draw_many(FULL, 60)
    order = random.Random(0).sample(range(60), 60)

    def one(i: int) -> ViewParams:
        return draw(
            FULL, seed=0, key=f"k{i}", pass_index=0, source_size=SOURCE, view_size=(224, 224)
        )

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(one, order)) == [expected[i] for i in order]


def test_seed_key_and_pass_each_give_another_view() -> None:
    base = {"seed": 1, "key": "a", "pass_index": 2, "source_size": SOURCE, "view_size": (224, 224)}
    views = [
        draw(ViewPolicy(), **(base | change))  # type: ignore[arg-type]
        for change in (
            {},
            {"seed": 2},
            {"pass_index": 1},
            {"key": "b"},
            {"seed": 2, "pass_index": 1},  # the two numbers swapped
            {"key": "a\0"},
            {"key": ""},
            {"key": "ä"},
            {"key": "\udce4"},  # a file name that is not UTF-8
        )
    ]
    assert len({view.geometry for view in views}) == len(views)


def test_parameters_vary() -> None:
    views = draw_many(FULL, 200)
    assert len({view.geometry for view in views}) > 195
    assert {view.of(Mirror) for view in views} == {(), (Mirror(),)}
    assert len({view.of(Operation) for view in views}) > 100
    erased = [view for view in views if view.of(EraseBox)]
    assert len({view.of(EraseBox) for view in erased}) == len(erased) > 20


def test_changing_one_component_does_not_change_draws_of_the_others() -> None:
    before = draw_many(FULL, 100)
    for text in (
        "crop+flip:0.9+rand-m9-n2-mstd0.5-inc1+erase:0.25",
        "crop+flip+rand-m3-n5-p1+erase:0.25",
        "crop+flip+erase:0.9",
        "crop:0.3..0.5+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25",
    ):
        policy = ViewPolicy.parse(text)
        after = draw_many(policy, 100)
        if policy.geometry == FULL.geometry:
            assert [view.geometry for view in after] == [view.geometry for view in before]
        if policy.component(Flip) == FULL.component(Flip):
            assert [v.of(Mirror) for v in after] == [v.of(Mirror) for v in before]
        if policy.component(RandAugment) == FULL.component(RandAugment):
            assert [view.of(Operation) for view in after] == [view.of(Operation) for view in before]
        boxes = [[view.of(EraseBox) for view in views] for views in (before, after)]
        kept = [(old, new) for old, new in zip(*boxes, strict=True) if old]
        assert kept
        assert all(old == new for old, new in kept)


@pytest.mark.parametrize("source", [(375, 500), (500, 375), (32, 32), (100, 700)])
def test_crops_are_distributed_as_timm_draws_them(
    source: tuple[int, int], make_image: Callable[[int, int], Image.Image]
) -> None:
    image = make_image(*source)
    random.seed(0)
    boxes = [
        RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        for _ in range(1500)
    ]
    ours = [view.geometry for view in draw_many(ViewPolicy(), 1500, source)]
    statistics = (
        lambda box: box[2] * box[3],
        lambda box: math.log(box[3] / box[2]),
        lambda box: box[0],
        lambda box: box[1],
        lambda box: box[2] ** 2,
    )
    for statistic in statistics:
        theirs, drawn = [statistic(box) for box in boxes], [statistic(box) for box in ours]
        standard_error = math.hypot(stdev(theirs), stdev(drawn)) / math.sqrt(1500)
        assert abs(mean(theirs) - mean(drawn)) < 4 * standard_error + 1e-9
    # Boxes reach both ends of both sides; the exact ends are a matter of luck in a long image.
    for start, length, side in ((0, 2, source[0]), (1, 3, source[1])):
        assert min(box[start] for box in ours) <= side / 100
        assert max(box[start] + box[length] for box in ours) >= side * 0.99


def test_crops_reach_every_edge_exactly() -> None:
    boxes = [view.geometry for view in draw_many(ViewPolicy(), 500, (12, 12))]
    for start, length in ((0, 2), (1, 3)):
        assert min(box[start] for box in boxes) == 0
        assert max(box[start] + box[length] for box in boxes if box[length] < 9) == 12


@pytest.mark.parametrize(
    ("source", "box"),
    [
        ((1, 1), (0, 0, 1, 1)),
        ((2, 500), (0, 248, 2, 3)),  # 2 * 4/3 = 2.67 columns, in the middle
        ((500, 2), (248, 0, 3, 2)),
        ((1, 65535), (0, 32767, 1, 1)),
        ((10, 1000), (0, 493, 10, 13)),
    ],
)
def test_an_image_that_no_crop_fits_gives_its_middle(
    source: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    views = draw_many(ViewPolicy.parse("crop:1..1"), 20, source)
    assert {view.geometry for view in views} == {box}


@pytest.mark.parametrize("source", [(1, 1), (1, 3), (2, 2), (3, 500), (65535, 7), (65535, 65535)])
def test_crops_of_any_image_lie_inside_it(source: tuple[int, int]) -> None:
    for view in draw_many(ViewPolicy(), 50, source):
        assert isinstance(view.geometry, CropBox)
        top, left, height, width = view.geometry
        assert top >= 0 <= left
        assert 1 <= height <= source[0] - top
        assert 1 <= width <= source[1] - left


def test_flips_and_erasing_have_the_requested_frequency() -> None:
    views = draw_many(ViewPolicy.parse("center+flip:0.2+erase:0.7"), 2000)
    # Standard errors are 0.009 and 0.010.
    assert 0.16 < mean(len(view.of(Mirror)) for view in views) < 0.24
    assert 0.66 < mean(len(view.of(EraseBox)) for view in views) < 0.74
    never = draw_many(ViewPolicy.parse("center"), 50)
    assert not any(view.steps for view in never)
    assert all(
        view.of(Mirror) and view.of(EraseBox)
        for view in draw_many(ViewPolicy.parse("center+flip:1+erase:1"), 50)
    )


def test_erased_boxes_are_distributed_as_timm_draws_them() -> None:
    class Recorder:
        dtype = None

        def __init__(self) -> None:
            self.boxes: list[tuple[int, int, int, int]] = []

        def __setitem__(self, at: tuple[slice, slice, slice], _: object) -> None:
            _, rows, columns = at
            box = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
            self.boxes.append(box)

    random.seed(0)
    recorder = Recorder()
    timm = RandomErasing(1.0, device="cpu")
    for _ in range(1500):
        timm._erase(recorder, 3, 224, 224, None)
    ours = []
    for view in draw_many(ViewPolicy.parse("center+erase:1"), 1500):
        (box,) = view.of(EraseBox)
        pixels = [edge * 224 / 65536 for edge in box[:4]]
        assert all(abs(edge - round(edge)) < 0.5 for edge in pixels)
        ours.append(tuple(map(round, pixels)))
    for statistic in (
        lambda box: box[2] * box[3],
        lambda box: math.log(box[2] / box[3]),
        lambda box: box[0],
        lambda box: box[1],
    ):
        theirs, drawn = [statistic(box) for box in recorder.boxes], [statistic(b) for b in ours]
        standard_error = math.hypot(stdev(theirs), stdev(drawn)) / math.sqrt(1500)
        assert abs(mean(theirs) - mean(drawn)) < 4 * standard_error


def test_randaugment_applies_every_operation_alike_and_half_of_them() -> None:
    views = draw_many(ViewPolicy.parse("center+rand-m9-n2-mstd0.5-inc1"), 3000)
    names = [operation.name for view in views for operation in view.of(Operation)]
    assert 2800 < len(names) < 3200  # of 6000, standard error 39
    for name in OPERATIONS:
        assert 150 < names.count(name) < 250  # 200 expected, standard error 14
    assert {len(view.of(Operation)) for view in views} == {0, 1, 2}


def test_magnitudes_follow_timms_scale() -> None:
    drawn: dict[str, list[float]] = {}
    for view in draw_many(ViewPolicy.parse("center+rand-m9-n4-p1-mstd0.5-inc1"), 3000):
        for name, argument in view.of(Operation):
            drawn.setdefault(name, []).append(argument)
    # Magnitude 9 of 10, spread 0.5, cut at 10: about 800 draws of each operation.
    for name, full in (("rotate", 30), ("shear_x", 0.3), ("shear_y", 0.3), ("translate_x", 0.45)):
        sizes = [abs(argument) / full for argument in drawn[name]]
        assert abs(mean(sizes) - 0.9) < 0.01
        assert 0.04 < stdev(sizes) < 0.06
        assert max(sizes) == pytest.approx(1, abs=1e-3)
        assert 0.4 < mean(argument > 0 for argument in drawn[name]) < 0.6
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert min(drawn[name]) == pytest.approx(0.1, abs=1e-4)
        assert 1.8 < max(drawn[name]) < 1.901  # float16 steps by 0.001 here
        assert abs(mean(abs(argument - 1) for argument in drawn[name]) - 0.81) < 0.02
    # 4 - int(4 * level): 0 at the cut, 1 from level 0.75 up, 2 below.
    assert {0, 1} <= set(drawn["posterize"]) <= {0, 1, 2}
    assert drawn["posterize"].count(1) > 0.9 * len(drawn["posterize"])
    assert 0 <= min(drawn["solarize"]) <= max(drawn["solarize"]) < 256 * 0.35
    assert 110 * 0.65 < min(drawn["solarize_add"]) <= max(drawn["solarize_add"]) == 110
    assert set(drawn["invert"]) == set(drawn["equalize"]) == set(drawn["autocontrast"]) == {0}


def test_arguments_without_increasing_severity_and_with_uniform_magnitudes() -> None:
    drawn: dict[str, list[float]] = {}
    for view in draw_many(ViewPolicy.parse("center+rand-m10-n4-p1-mstd101"), 2000):
        for name, argument in view.of(Operation):
            drawn.setdefault(name, []).append(argument)
    assert min(drawn["color"]) < 0.15 < 1.85 < max(drawn["color"])
    assert abs(mean(drawn["color"]) - 1) < 0.08
    assert set(drawn["posterize"]) == {0, 1, 2, 3}
    assert min(drawn["solarize"]) < 10 < 246 < max(drawn["solarize"]) <= 255
    assert abs(mean(map(abs, drawn["rotate"])) - 15) < 1.2


def test_a_fixed_magnitude_gives_the_same_argument_up_to_its_sign() -> None:
    drawn: dict[str, set[float]] = {}
    for view in draw_many(ViewPolicy.parse("center+rand-m5-n4-p1-inc1"), 200):
        for name, argument in view.of(Operation):
            drawn.setdefault(name, set()).add(argument)
    assert drawn.pop("rotate") == {-15, 15}
    assert drawn.pop("posterize") == {2}
    assert drawn.pop("solarize") == {128}
    assert drawn.pop("solarize_add") == {55}
    for name in ("autocontrast", "equalize", "invert"):
        assert drawn.pop(name) == {0}
    for name in ("shear_x", "shear_y"):
        assert sorted(drawn.pop(name)) == pytest.approx([-0.15, 0.15], rel=2**-11)
    for name in ("translate_x", "translate_y"):
        assert sorted(drawn.pop(name)) == pytest.approx([-0.225, 0.225], rel=2**-11)
    for arguments in drawn.values():
        assert sorted(arguments) == pytest.approx([0.55, 1.45], rel=2**-11)


def test_magnitudes_beyond_ten_need_mmax() -> None:
    cut = draw_many(ViewPolicy.parse("center+rand-m20-n8-p1-inc1"), 50)
    free = draw_many(ViewPolicy.parse("center+rand-m20-n8-p1-mmax20-inc1"), 50)
    angles = [
        {
            abs(argument)
            for view in views
            for name, argument in view.of(Operation)
            if name == "rotate"
        }
        for views in (cut, free)
    ]
    assert angles == [{30.0}, {60.0}]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"pass_index": -1},
        {"source_size": (0, 5)},
        {"source_size": (65536, 5)},
        {"view_size": (224, 0)},
    ],
)
def test_impossible_arguments_are_usage_errors(change: dict[str, object]) -> None:
    arguments = {"seed": 0, "key": "k", "pass_index": 0, "source_size": SOURCE}
    with pytest.raises(UsageError):
        draw(FULL, **(arguments | {"view_size": (224, 224)} | change))  # type: ignore[arg-type]
