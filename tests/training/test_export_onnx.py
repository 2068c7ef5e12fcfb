"""ONNX files, run by onnxruntime as whoever gets one would."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from scalekd.cli.commands import export as export_command
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.export import onnx as export_onnx
from scalekd.export.timm import export_student
from scalekd.students import create_student
from scalekd.training import TrainedStudent, student_facts

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SWIN = {"embed_dim": 12, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 2}
NAMES = ("ant", "bee", "cat")


def a_student(model: str = "test_resnet", **model_kwargs: Any) -> TrainedStudent:
    torch.manual_seed(3)
    student = create_student(
        model, num_classes=3, img_size=64, mean=(0.1, 0.2, 0.3), model_kwargs=model_kwargs
    )
    for module in student.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
    nn.init.normal_(student.model.get_classifier().weight)  # type: ignore[operator]
    facts = student_facts(student.spec, NAMES)
    return TrainedStudent(Path("run/last"), student.spec, facts, student.model.eval())


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [("test_resnet", {}), ("test_vit", {}), ("swin_tiny_patch4_window7_224", SWIN)],
)
def test_onnxruntime_gives_the_students_logits_for_any_batch(
    tmp_path: Path, model: str, kwargs: dict[str, Any]
) -> None:
    student, path = a_student(model, **kwargs), tmp_path / "student.onnx"
    exported = export_student(student, path, export_format="onnx")
    assert 0 <= exported.difference <= export_onnx.TOLERANCE
    assert [file.name for file in tmp_path.iterdir()] == ["student.onnx"]  # weights inside
    session = onnxruntime.InferenceSession(str(path))
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, 64, 64])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 64, 64)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        with torch.inference_mode():
            expected = student.model(images)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_the_file_says_how_to_feed_it(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    export_student(a_student(), path, export_format="onnx")
    onnx.checker.check_model(path, full_check=True)
    told = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(told["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(told["img_size"]) == [64, 64]
    assert json.loads(told["class_names"]) == list(NAMES)
    assert told["input"] == "RGB, NCHW float32: (pixels / 255 - mean) / std"
    assert {"std", "interpolation", "crop_pct", "architecture"} < told.keys()


def test_a_file_with_other_logits_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = a_student()
    save = onnx.save

    def corrupt(proto: Any, path: Path) -> None:
        (bias,) = (w for w in proto.graph.initializer if w.name == "fc.bias")
        values = onnx.numpy_helper.to_array(bias) + 0.01
        bias.CopyFrom(onnx.numpy_helper.from_array(values, "fc.bias"))
        save(proto, path)

    monkeypatch.setattr(onnx, "save", corrupt)
    with pytest.raises(EnvironmentFault, match="onnxruntime's outputs differ"):
        export_student(student, tmp_path / "student.onnx", export_format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_onnx_cannot_express_is_one_line(tmp_path: Path) -> None:
    student = a_student()

    class Branching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    student.model = Branching()
    with pytest.raises(UsageError, match=r"cannot express test_resnet in ONNX: [^\n]+$"):
        export_student(student, tmp_path / "student.onnx", export_format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(UsageError, match=r"onnxruntime not installed; `pip install 'scalekd\[onnx"):
        export_student(a_student(), tmp_path / "student.onnx", export_format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_knows_the_format() -> None:
    assert "onnx" in CliRunner().invoke(export_command, ["--help"]).output
