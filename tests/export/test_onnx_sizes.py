"""ONNX files for other image sizes and with feature maps, run by onnxruntime."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner

from scalekd.cli.commands import export as export_command
from scalekd.errors import UsageError
from scalekd.export import export_student
from scalekd.students import create_student
from scalekd.training import TrainedStudent, student_facts

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SWIN = {"embed_dim": 12, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 2}
SWIN_NAME = "swin_tiny_patch4_window7_224"


def a_student(model: str, *, headless: bool = False, **model_kwargs: Any) -> TrainedStudent:
    torch.manual_seed(3)
    student = create_student(model, num_classes=3, img_size=64, model_kwargs=model_kwargs)
    spec, network = student.spec, student.model.eval()
    if headless:
        network.reset_classifier(0)  # type: ignore[operator]
        spec = spec.model_copy(update={"num_classes": 0})
    return TrainedStudent(Path("run/last"), spec, student_facts(spec, None), network)


def in_timm(student: TrainedStudent, folder: Path, size: tuple[int, int]) -> list[torch.Tensor]:
    """Logits and maps of timm's model at another size, on fixed images."""
    export_student(student, folder)
    kwargs: dict[str, Any] = {}
    if "vit" in student.spec.architecture:
        kwargs = {"img_size": size}
    elif "swin" in student.spec.architecture:
        kwargs = {"strict_img_size": False}
    name, images = f"local-dir:{folder}", images_of(size)
    with torch.inference_mode():
        logits = timm.create_model(name, pretrained=True, **kwargs).eval()(images)
        backbone = timm.create_model(name, pretrained=True, features_only=True, **kwargs).eval()
        maps = backbone(images)
    if "swin" in student.spec.architecture:
        maps = [m.permute(0, 3, 1, 2) for m in maps]
    return [logits, *maps]


def images_of(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(7))


def run(path: Path, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, {"images": images_of(size).numpy()})
    return dict(zip(names, map(torch.from_numpy, outputs), strict=True))


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("test_resnet", {}),
        ("test_vit", {}),
        pytest.param("test_convnext", {}, marks=pytest.mark.slow),
        pytest.param(SWIN_NAME, SWIN, marks=pytest.mark.slow),
    ],
)
def test_a_file_for_another_size_gives_the_maps_that_timm_gives(
    tmp_path: Path, model: str, kwargs: dict[str, Any]
) -> None:
    size = (96, 160)
    student, path = a_student(model, **kwargs), tmp_path / "student.onnx"
    export_student(student, path, export_format="onnx", img_size=size, features=True)
    logits, *maps = in_timm(student, tmp_path / "timm", size)
    found = run(path, size)
    names = [name for name in found if name.startswith("features_")]
    assert list(found) == ["logits", *(f"features_{i}" for i in range(len(names)))]
    assert len(names) >= 3
    torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
    for name, expected in zip(reversed(names), reversed(maps), strict=False):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
    told = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(told["img_size"]) == [96, 160]
    for described in json.loads(told["features"]):
        array = found[described["name"]]
        assert array.shape[1] == described["channels"]
        assert array.shape[2:] == (96 // described["stride"], 160 // described["stride"])


@pytest.mark.parametrize(
    "model",
    [
        "test_resnet",
        pytest.param("test_vit", marks=pytest.mark.slow),
        pytest.param("test_convnext", marks=pytest.mark.slow),
        pytest.param(SWIN_NAME, marks=pytest.mark.slow),
    ],
)
def test_a_file_for_any_size_takes_them_all(tmp_path: Path, model: str) -> None:
    kwargs = SWIN if model == SWIN_NAME else {}
    student, path = a_student(model, **kwargs), tmp_path / "student.onnx"
    export_student(student, path, export_format="onnx", img_size="any", features=True)
    (given,) = onnxruntime.InferenceSession(str(path)).get_inputs()
    assert given.shape == ["batch", 3, "height", "width"]
    for number, size in enumerate([(64, 64), (128, 96), (224, 320), (80, 48)]):
        logits, *maps = in_timm(student, tmp_path / f"timm{number}", size)
        found = run(path, size)
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(list(found.values())[-1], maps[-1], rtol=1e-4, atol=1e-4)


def test_a_student_without_a_head_gives_its_pooled_features(tmp_path: Path) -> None:
    student, path = a_student("test_resnet", headless=True), tmp_path / "student.onnx"
    export_student(student, path, export_format="onnx", features=True)
    found = run(path, (64, 64))
    assert next(iter(found)) == "pooled"
    with torch.inference_mode():
        expected = student.model(images_of((64, 64)))
    torch.testing.assert_close(found["pooled"], expected, rtol=1e-4, atol=1e-4)
    pooled = list(found.values())[-1].mean((2, 3))
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "kwargs", "size"),
    [
        ("test_vit", {}, (100, 100)),  # no multiple of the patch
        (SWIN_NAME, SWIN, (97, 96)),
        ("mixer_s16_224", {}, (96, 96)),  # a table per place
    ],
)
def test_sizes_that_an_architecture_refuses_are_one_line(
    tmp_path: Path, model: str, kwargs: dict[str, Any], size: tuple[int, int]
) -> None:
    student = a_student(model, **kwargs)
    with pytest.raises(UsageError, match=rf"--img-size: {model} does not accept .*{size[0]} x"):
        export_student(student, tmp_path / "x.onnx", export_format="onnx", img_size=size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_student_of_one_size_has_no_file_for_any_size(tmp_path: Path) -> None:
    student = a_student("mixer_s16_224")
    with pytest.raises(UsageError, match=r"for images of any size; give --img-size .*") as caught:
        export_student(student, tmp_path / "x.onnx", export_format="onnx", img_size="any")
    assert str(caught.value).isprintable()
    assert "\\x1b" not in str(caught.value)


def test_options_of_onnx_are_refused_for_other_formats(tmp_path: Path) -> None:
    student = a_student("test_resnet")
    with pytest.raises(UsageError, match="--img-size: is for --format onnx"):
        export_student(student, tmp_path / "x", img_size=(96, 96))
    with pytest.raises(UsageError, match="--features: is for --format onnx"):
        export_student(student, tmp_path / "x", features=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["0", "64x", "x64", "64x0", "64 x 64", "9000", "-1", "64x64x3"])
def test_what_is_no_size_is_refused(text: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--output", "x", "--format", "onnx", "--img-size", text]
    result = CliRunner().invoke(export_command, arguments)
    assert result.exit_code == 2
    assert "is no size; give a side such as 384" in " ".join(result.output.split())
