"""Every operation draws what timm draws for the same argument, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from scalekd.views import OPERATIONS, CropBox, Operation, ViewParams, render

TIMM = {
    "autocontrast": auto_augment.auto_contrast,
    "equalize": auto_augment.equalize,
    "invert": auto_augment.invert,
    "rotate": auto_augment.rotate,
    "posterize": auto_augment.posterize,
    "solarize": auto_augment.solarize,
    "solarize_add": auto_augment.solarize_add,
    "color": auto_augment.color,
    "contrast": auto_augment.contrast,
    "brightness": auto_augment.brightness,
    "sharpness": auto_augment.sharpness,
    "shear_x": auto_augment.shear_x,
    "shear_y": auto_augment.shear_y,
    "translate_x": auto_augment.translate_x_rel,
    "translate_y": auto_augment.translate_y_rel,
}
ARGUMENTS = {
    "autocontrast": [0],
    "equalize": [0],
    "invert": [0],
    "rotate": [-27.34375, 30, 0.125],
    "posterize": [1, 2, 4, 8],
    "solarize": [26, 0, 128, 256],
    "solarize_add": [99, 110, 128, 0],
    "color": [0.1, 1.8095703125, 1.9],
    "contrast": [0.1, 1.8095703125],
    "brightness": [0.1, 1.8095703125],
    "sharpness": [0.1, 1.8095703125],
    "shear_x": [-0.27, 0.3],
    "shear_y": [-0.27, 0.3],
    "translate_x": [-0.405, 0.45, 1.5],
    "translate_y": [-0.405, 0.45],
}


def whole_view(image: Image.Image, *operations: Operation, **changes: object) -> ViewParams:
    fields = {
        "geometry": CropBox(0, 0, image.height, image.width),
        "steps": operations,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    return ViewParams(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("name", "argument"), [(name, value) for name in ARGUMENTS for value in ARGUMENTS[name]]
)
def test_an_operation_equals_timms(
    image: Image.Image, name: str, argument: float, interpolation: str
) -> None:
    view = whole_view(image, Operation(name, argument), interpolation=interpolation)
    drawn = render(image, view, view_size=(image.height, image.width))
    whole = OPERATIONS[name].whole
    arguments = () if name in ("autocontrast", "equalize", "invert") else (argument,)
    expected = TIMM[name](
        image.copy(),
        *(int(value) if whole else value for value in arguments),
        fillcolor=(124, 116, 104),
        resample=Image.Resampling[interpolation.upper()],
    )
    np.testing.assert_array_equal(drawn, np.asarray(expected))


def test_every_operation_is_covered_and_changes_the_picture(image: Image.Image) -> None:
    plain = render(image, whole_view(image), view_size=(97, 121))
    for name, arguments in ARGUMENTS.items():
        view = whole_view(image, Operation(name, arguments[0] or arguments[-1]))
        assert (render(image, view, view_size=(97, 121)) != plain).any(), name
    assert list(ARGUMENTS) == list(TIMM) == list(OPERATIONS)


def test_posterize_to_zero_bits_gives_black(image: Image.Image) -> None:
    view = whole_view(image, Operation("posterize", 0))
    assert not render(image, view, view_size=(30, 40)).any()


def test_operations_apply_in_their_order(image: Image.Image) -> None:
    turned, darker = Operation("rotate", 20), Operation("brightness", 0.5)
    first = render(image, whole_view(image, turned, darker), view_size=(97, 121))
    second = render(image, whole_view(image, darker, turned), view_size=(97, 121))
    assert first[0, 0].tolist() == [62, 58, 52]  # the fill colour, then halved
    assert second[0, 0].tolist() == [124, 116, 104]


def test_the_fill_colour_is_the_policys_mean(image: Image.Image) -> None:
    view = whole_view(image, Operation("translate_x", 1.5), mean=(0.5, 0.0, 1.0))
    drawn = render(image, view, view_size=(8, 8))
    assert (drawn == [128, 0, 255]).all()


def test_numbers_in_the_cache_never_change() -> None:
    names = "autocontrast equalize invert rotate posterize solarize solarize_add color contrast"
    names += " brightness sharpness shear_x shear_y translate_x translate_y"
    assert [OPERATIONS[name].id for name in names.split()] == list(range(1, 16))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("blur", 1),
        ("rotate", float("nan")),
        ("rotate", 181),
        ("posterize", 1.5),
        ("posterize", -1),
        ("solarize", 257),
        ("color", float("inf")),
        ("color", -0.1),
        ("invert", 1),
    ],
)
def test_an_argument_out_of_range_is_refused(name: str, argument: float) -> None:
    with pytest.raises(ValueError, match=name):
        Operation(name, argument).check()
