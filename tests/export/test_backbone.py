"""Exported students as backbones of other programs, with their trained weights in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from scalekd.errors import DataError, UsageError
from scalekd.export import check_weights, export_student, load_backbone
from scalekd.export.backbone import any_size_arguments
from scalekd.export.card import model_card
from scalekd.students import create_student
from scalekd.training import TrainedStudent, student_facts

NAMES = ("ant", "bee", "cat")
SWIN = {"embed_dim": 12, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 2}
STUDENTS: list[tuple[str, dict[str, Any]]] = [
    ("test_resnet", {}),
    ("test_convnext", {}),
    ("test_vit", {}),
    ("swin_tiny_patch4_window7_224", SWIN),
]


def exported(folder: Path, model: str, kwargs: dict[str, Any]) -> tuple[Path, TrainedStudent]:
    torch.manual_seed(3)
    student = create_student(model, num_classes=3, img_size=64, model_kwargs=kwargs)
    facts = student_facts(student.spec, NAMES)
    trained = TrainedStudent(Path("run/last"), student.spec, facts, student.model.eval())
    export_student(trained, folder / "student")
    return folder / "student", trained


@pytest.mark.parametrize(("model", "kwargs"), STUDENTS)
@pytest.mark.parametrize("size", [(64, 64), (96, 96), (128, 160)])
def test_a_backbone_takes_other_sizes_with_the_trained_weights(
    tmp_path: Path, model: str, kwargs: dict[str, Any], size: tuple[int, int]
) -> None:
    folder, _ = exported(tmp_path, model, kwargs)
    backbone = load_backbone(folder)
    images = torch.randn(2, 3, *size, requires_grad=True)
    maps = backbone(images)
    sum(m.square().mean() for m in maps).backward()  # type: ignore[union-attr]
    assert images.grad is not None
    last = maps[-1]
    stride = backbone.feature_info.reduction()[-1]  # type: ignore[union-attr, operator]
    assert last.shape[1] == backbone.feature_info.channels()[-1]  # type: ignore[union-attr, operator]
    assert tuple(last.shape[2:]) == tuple(-(-side // stride) for side in size)


@pytest.mark.parametrize(("model", "kwargs"), STUDENTS)
def test_ways_that_leave_weights_random_are_found(
    tmp_path: Path, model: str, kwargs: dict[str, Any]
) -> None:
    folder, _ = exported(tmp_path, model, kwargs)
    stored = load_file(folder / "model.safetensors")
    name = f"local-dir:{folder}"
    check_weights(
        timm.create_model(name, pretrained=True, features_only=True), stored, where="here"
    )
    with pytest.raises(DataError, match="the weights were not loaded"):
        check_weights(timm.create_model(name, features_only=True), stored, where="here")
    other = timm.create_model("test_resnet" if model != "test_resnet" else "test_vit")
    with pytest.raises(DataError, match="has no weights for"):
        check_weights(other, stored, where="here")


def test_a_wrapped_backbone_is_compared_by_the_ends_of_its_names(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path, "test_resnet", {})
    detector = torch.nn.ModuleDict({"backbone": load_backbone(folder, out_indices=(2, 3))})
    stored = load_file(folder / "model.safetensors")
    check_weights(detector, stored, where="here")
    narrow = {name: tensor[:1] for name, tensor in stored.items() if tensor.ndim}
    with pytest.raises(DataError, match=r"has shape .* the student's \(1"):
        check_weights(detector, narrow, where="here")


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the folder of an exported student"):
        load_backbone(tmp_path / "nowhere")
    folder, _ = exported(tmp_path, "test_resnet", {})
    with pytest.raises(UsageError, match="does not open as a backbone"):
        load_backbone(folder, no_such_argument=1)
    for levels, message in (
        ((2, 99), r"test_resnet does not have all of the levels \(2, 99\)"),
        ((), "are no levels"),
        ("34", "are no levels"),
    ):
        with pytest.raises(UsageError, match=message):
            load_backbone(folder, out_indices=levels)  # type: ignore[arg-type]


def test_statistics_of_batch_norms_are_weights_too(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path, "test_resnet", {})
    weights = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if "running" not in n}, folder / "model.safetensors"
    )
    with pytest.raises(DataError, match=r"has no weights for .*running_mean"):
        load_backbone(folder)


def test_the_card_has_the_line_for_the_architecture_at_hand(tmp_path: Path) -> None:
    lines = {}
    for model, kwargs in STUDENTS:
        (tmp_path / model).mkdir()
        _, student = exported(tmp_path / model, model, kwargs)
        card = model_card(
            TrainedStudent(
                student.checkpoint,
                student.spec,
                {**student.state, "samples_viewed": 1, "epoch": 1},
                student.model,
            )
        )
        lines[model] = next(line for line in card.splitlines() if line.startswith("backbone ="))
    assert lines["test_resnet"].endswith("features_only=True)")
    assert lines["test_vit"].endswith("dynamic_img_size=True, dynamic_img_pad=True)")
    swin = lines["swin_tiny_patch4_window7_224"]
    assert swin.endswith("strict_img_size=False, feature_cls='getter')")
    for model, line in lines.items():  # the line opens the folder, for another size
        code = line.replace("FOLDER", str(tmp_path / model / "student"))
        scope: dict[str, Any] = {"timm": timm}
        exec(code, scope)  # noqa: S102
        maps = scope["backbone"](torch.randn(1, 3, 96, 160))
        assert maps[-1].shape[1] == scope["backbone"].feature_info.channels()[-1]
        stored = load_file(tmp_path / model / "student/model.safetensors")
        check_weights(scope["backbone"], stored, where=model)
    assert any_size_arguments("mixer_s16_224") == {}


def test_model_args_do_not_repeat_the_number_of_classes(tmp_path: Path) -> None:
    folder, student = exported(tmp_path, "test_resnet", {})
    config = json.loads((folder / "config.json").read_text())
    assert "num_classes" not in config["model_args"]
    assert config["num_classes"] == 3
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 3
    again = create_student(f"local-dir:{folder}", num_classes=5, pretrained=True)
    assert again.spec.num_classes == 5
    name, kept = next(iter(student.model.state_dict().items()))
    assert torch.equal(again.model.state_dict()[name], kept)


@pytest.mark.parametrize(("model", "kwargs"), STUDENTS)
def test_transformers_opens_the_export(tmp_path: Path, model: str, kwargs: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, student = exported(tmp_path, model, kwargs)
    opened = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(opened(images).logits, student.model(images))
    assert tuple(opened.config.id2label.values()) == NAMES
    tuned = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True
    )
    with torch.no_grad():
        assert tuned(images).logits.shape == (2, 5)
