import re
from pathlib import Path
from typing import Any

import markdown_it
import pytest
import timm
import torch
from huggingface_hub import DatasetCard
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import nn

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.export import timm as export_module
from scalekd.export.card import model_card
from scalekd.export.timm import ExportFormat, export_student
from scalekd.students import create_student
from scalekd.training import TrainedStudent, student_facts
from scalekd.training.state import plain_names

NAMES = ("ant", "bee", "cat")


SWIN = {"embed_dim": 12, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 2}


def a_student(model: str, img_size: int, **model_kwargs: Any) -> TrainedStudent:
    torch.manual_seed(3)
    student = create_student(
        model,
        num_classes=3,
        img_size=img_size,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
        model_kwargs={"drop_path_rate": 0.1, **model_kwargs},
    )
    for module in student.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
    facts = student_facts(student.spec, NAMES)
    return TrainedStudent(Path("run/last"), student.spec, facts, student.model)


@pytest.mark.parametrize("export_format", ["timm", "hf", "safetensors"])
def test_a_filter_that_timm_does_not_have_is_named(
    tmp_path: Path, export_format: ExportFormat
) -> None:
    facts = {"samples_viewed": 1, "epoch": 1}
    for number, (interpolation, is_noted) in enumerate(
        {"bilinear-opencv": export_format != "safetensors", "bilinear": False}.items()
    ):
        student = create_student("test_resnet", num_classes=3, interpolation=interpolation)
        trained = TrainedStudent(
            Path("run/last"),
            student.spec,
            student_facts(student.spec, NAMES) | facts,
            student.model,
        )
        output = tmp_path / str(number)
        exported = export_student(trained, output, export_format=export_format)
        noted = [line for line in exported.lines() if "no bilinear-opencv filter" in line]
        assert bool(noted) == is_noted
        if export_format == "hf":
            assert f"resize filter {interpolation}, crop" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "img_size", "kwargs"),
    [
        ("test_resnet", 64, {}),
        ("test_vit", 64, {}),
        ("swin_tiny_patch4_window7_224", 64, SWIN),
        ("test_mambaout", 64, {}),
        ("test_convnext", 64, {}),
    ],
)
def test_timm_opens_the_export_with_identical_outputs(
    tmp_path: Path, model: str, img_size: int, kwargs: dict[str, Any]
) -> None:
    student = a_student(model, img_size, **kwargs)
    exported = export_student(student, tmp_path / "out")
    images = torch.randn(3, 3, img_size, img_size)
    name = f"local-dir:{tmp_path / 'out'}"
    with torch.inference_mode():
        reopened = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(reopened(images), student.model.eval()(images))
        backbone = timm.create_model(name, pretrained=True, features_only=True).eval()
        assert tuple(backbone.feature_info.channels()) == exported.feature_channels
        maps = backbone(images)
        assert len(maps) == len(backbone.feature_info.channels()) >= 3
        # As the head pools the last map, so a detector reads what the classifier read.
        expected = student.model.forward_intermediates(  # type: ignore[operator]
            images, indices=len(maps), intermediates_only=True, norm=False
        )
        last = maps[-1] if maps[-1].shape == expected[-1].shape else maps[-1].permute(0, 3, 1, 2)
        assert torch.equal(last, expected[-1])
    data = resolve_model_data_config(reopened)
    assert data["mean"] == [0.1, 0.2, 0.3]
    assert tuple(data["input_size"]) == (3, img_size, img_size)
    assert reopened.pretrained_cfg["label_names"] == list(NAMES)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_model_card_says_what_the_run_recorded_and_no_more(tmp_path: Path) -> None:
    student = a_student("test_resnet", 32)
    student.state = {
        **student.state,
        "objective": "kd",
        "teacher": "swin_large_patch4_window7_224.ms_in22k_ft_in1k",
        "teacher_licence": None,
        "cache_id": "ab" * 32,
        "samples_viewed": 1234567,
        "epoch": 7,
        "metrics": {"eval_top1": 71.25},
    }
    export_student(student, tmp_path / "out", export_format="hf")
    card = (tmp_path / "out/README.md").read_text()
    for text in ("distilled from swin_large_patch4", "| cache, fingerprint | abab", "| 71.25 % |"):
        assert text in card
    assert "| views seen in training | 1,234,567 |" in card
    assert "| licence of the teacher's weights | not recorded |" in card
    for absent in ("recipe", "Curves", "Settings"):
        assert absent not in card
    assert "top-5" not in card
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 3


def test_a_model_card_shows_what_a_run_says_as_text() -> None:
    hostile = "\x1b[31m\u202e\n---\nlicense: mit\n```\n# pay | <script> [a](http://evil)"
    student = a_student("test_resnet", 32)
    student.state = {
        **student.state,
        "objective": "kd",
        "teacher": hostile,
        "teacher_licence": hostile,
        "teacher_note": 10**5 * "x",
        "software": {"scalekd": hostile},
        "settings": {"model": hostile, "note": 10**5 * "x ", "long": 10**5 * "y"},
        "samples_viewed": 1,
        "epoch": 1,
    }
    card = model_card(student)
    assert all(character.isprintable() or character == "\n" for character in card)
    # Settings wrap at words: 500 lines of 80 letters.
    assert len(card) < 50_000
    parsed = DatasetCard(card)
    assert parsed.data.to_dict().keys() == {"library_name", "tags"}
    page = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(parsed.text)
    assert "<script>" not in page
    assert "href" not in page
    assert re.findall("<h[12]>", page) == ["<h1>", "<h2>"]


def test_bare_weights_carry_timms_names(tmp_path: Path) -> None:
    student = a_student("test_resnet", 32)
    export_student(student, tmp_path / "out.safetensors", export_format="safetensors")
    state = load_file(tmp_path / "out.safetensors")
    assert state.keys() == student.model.state_dict().keys()


def test_an_export_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = a_student("test_resnet", 32)
    save = export_module.save_file

    def corrupt(state: dict[str, torch.Tensor], *rest: object, **more: object) -> None:
        save({**state, "fc.bias": state["fc.bias"] + 1e-6}, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(export_module, "save_file", corrupt)
    with pytest.raises(EnvironmentFault, match="logits of the exported student differ"):
        export_student(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_student(a_student("test_resnet", 32), tmp_path / "out")


def test_wrappers_leave_no_trace_in_names() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    wrapped = {
        f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()
    } | {"module.layer9._orig_mod.weight": torch.zeros(1)}
    assert plain_names(wrapped).keys() == {*model.state_dict(), "layer9.weight"}
