"""Students without a classifier after training: exported, evaluated by features, fine-tuned."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file

from scalekd.errors import UsageError
from scalekd.export import load_backbone
from scalekd.pipelines.configure import train_config
from scalekd.pipelines.evaluate import EvaluateConfig, evaluate
from scalekd.pipelines.export import export
from scalekd.pipelines.train_student import train_student
from scalekd.training import load_trained_student


@pytest.fixture(scope="module", params=["test_resnet", "test_vit", "test_convnext"])
def run(
    request: pytest.FixtureRequest,
    cache: Path,
    image_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A student of features alone, after one epoch. Read only."""
    output = tmp_path_factory.mktemp("headless") / "run"
    values = {"cache": str(cache), "data_dir": str(image_folder), "model": request.param}
    values |= {"objective": "features", "epochs": 1, "batch_size": 16, "workers": 0, "amp": "no"}
    train_student(train_config(None, {**values, "output": str(output), "val_split": None}))
    return output


@torch.inference_mode()
def test_timm_opens_the_export_as_a_model_of_features(run: Path, tmp_path: Path) -> None:
    exported = export(run, tmp_path / "export", export_format="hf")
    assert exported.num_classes == 0
    student = load_trained_student(run)
    images = torch.randn(2, 3, *student.spec.img_size)
    opened = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    assert torch.equal(opened(images), student.model(images))
    card = (tmp_path / "export/README.md").read_text()
    assert "without a classifier" in card
    assert "image-feature-extraction" in card
    assert len(load_backbone(tmp_path / "export")(images)) >= 2


@torch.inference_mode()
def test_safetensors_and_onnx(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "weights.safetensors", export_format="safetensors")
    student = load_trained_student(run)
    stored = load_file(tmp_path / "weights.safetensors")
    assert stored.keys() == student.model.state_dict().keys()
    export(run, tmp_path / "student.onnx", export_format="onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"]
    )
    images = torch.randn(3, 3, *student.spec.img_size)
    (features,) = session.run(["pooled"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), student.model(images), atol=1e-3, rtol=0)


def test_it_is_evaluated_by_its_features(run: Path, image_folder: Path) -> None:
    settings = EvaluateConfig(model=str(run), data_dir=str(image_folder), workers=0)
    with pytest.raises(UsageError, match="evaluate its features with --knn-split or --linear-pro"):
        evaluate(settings)
    update = {"knn_split": "train", "knn_k": 3, "linear_probe": "train"}
    scores = evaluate(settings.model_copy(update=update))
    assert "top1" not in scores
    assert scores["knn_top1"] > 50  # three colours, which even random features tell apart
    assert scores["linear_top1"] > 50


@pytest.mark.parametrize("kind", ["run", "export", "weights"])
def test_it_is_fine_tuned_with_a_new_head(
    run: Path,
    image_folder: Path,
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, values = run, dict[str, Any]()
    if kind == "export":
        source = tmp_path / "export"
        export(run, source)
    if kind == "weights":
        source = tmp_path / "weights.safetensors"
        export(run, source, export_format="safetensors")
        spec = load_trained_student(run).spec
        values = {"model": spec.architecture, "img_size": spec.img_size}
    values |= {"data_dir": str(image_folder), "objective": "none", "epochs": 1, "batch_size": 16}
    values |= {"initial_checkpoint": str(source), "freeze": ("backbone",), "workers": 0}
    train_student(train_config(None, {**values, "output": str(tmp_path / "tuned"), "amp": "no"}))
    before = load_file(run / "last/model.safetensors")
    after = load_file(tmp_path / "tuned/last/model.safetensors")
    new = sorted(after.keys() - before.keys())
    assert len(new) == 2
    assert all(torch.equal(after[name], before[name]) for name in before)
    said = f"it has no classifier; the student's starts from random values ({', '.join(new)})"
    assert said in capsys.readouterr().err
    state = json.loads((tmp_path / "tuned/last/state.json").read_text())
    assert state["student"]["num_classes"] == 3
