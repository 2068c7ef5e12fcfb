"""Folders in timm's layout from someone else: no code, no other files, bounded configuration."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from scalekd.errors import DataError, ScaleKDError, UsageError
from scalekd.students import create_student

Config = dict[str, Any]


def exported(folder: Path, *, weights: str = "model.safetensors", **changes: Any) -> str:
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    if weights != "model.safetensors":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / weights)
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "best.pth"])
def test_weights_of_a_folder_are_read(tmp_path: Path, weights: str) -> None:
    name = exported(tmp_path / "x", weights=weights)
    torch.manual_seed(1)
    student = create_student(name, num_classes=4, pretrained=True)
    expected = timm.create_model(name, pretrained=True).state_dict()
    assert all(torch.equal(expected[n], t) for n, t in student.model.state_dict().items())


def test_another_number_of_classes_keeps_the_body(tmp_path: Path) -> None:
    name = exported(tmp_path / "x")
    notes: list[str] = []
    student = create_student(name, num_classes=7, pretrained=True, notes=notes)
    assert "4 classes in the file, 7 in the model" in notes[0]
    expected = timm.create_model(name, pretrained=True).state_dict()
    state = student.model.state_dict()
    assert state["head.weight"].shape[0] == 7
    assert all(torch.equal(expected[n], t) for n, t in state.items() if not n.startswith("head"))


@pytest.mark.parametrize("force", ["0", "1"])
def test_pickled_code_in_a_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: str
) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "planted"),))

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    name = exported(tmp_path / "x", weights="pytorch_model.bin")
    torch.save({"head.weight": Hostile()}, tmp_path / "x/pytorch_model.bin")
    with pytest.raises(DataError, match="never loaded"):
        create_student(name, num_classes=4, pretrained=True)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    "model_args",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"cache_dir": "/tmp"},
        {"features_only": True},
        {"in_chans": 4},
        {"depth": 10**9},
        {"x" * 5000: 1},
        {"norm_layer": {"a": 1}},
        {"act_layer": "x" * 5000},
    ],
)
def test_arguments_of_a_folder_are_checked(tmp_path: Path, model_args: Config) -> None:
    name = exported(tmp_path / "x", model_args=model_args)
    with pytest.raises((DataError, UsageError)) as caught:
        create_student(name, num_classes=4, pretrained=True)
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "hf-hub:owner/name"},
        {"architecture": 7},
        {"model_args": []},
        {"model_args": "x"},
        {"pretrained_cfg": []},
        {"pretrained_cfg": {"mean": "red"}},
        {"pretrained_cfg": {"mean": [None, 1, 2]}},
        {"pretrained_cfg": {"input_size": "big"}},
        {"pretrained_cfg": {"crop_pct": "all"}},
        {"pretrained_cfg": {"num_classes": "many"}},
    ],
)
def test_damaged_configurations_raise_our_errors(tmp_path: Path, changes: Config) -> None:
    name = exported(tmp_path / "x", **changes)
    with contextlib.suppress(ScaleKDError):  # a value that nobody reads may pass
        create_student(name, num_classes=4, img_size=32, pretrained=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, "\0", "{}", '{"architecture": "test_vit"']
)
def test_a_damaged_config_is_one_line(tmp_path: Path, text: str) -> None:
    name = exported(tmp_path / "x")
    (tmp_path / "x/config.json").write_text(text)
    with pytest.raises(ScaleKDError) as caught:
        create_student(name, num_classes=4, pretrained=True)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    name = exported(tmp_path / "x")
    (tmp_path / "x/model.safetensors").unlink()
    with pytest.raises(DataError, match="no file of weights"):
        create_student(name, num_classes=4, pretrained=True)


def test_tensors_of_another_model_are_named(tmp_path: Path) -> None:
    name = exported(tmp_path / "x")
    save_file({"a": torch.zeros(1)}, tmp_path / "x/model.safetensors")
    with pytest.raises(UsageError, match="does not fit"):
        create_student(name, num_classes=4, pretrained=True)


def test_a_huge_model_with_small_weights_is_refused_without_memory(tmp_path: Path) -> None:
    name = exported(tmp_path / "x", model_args={"embed_dim": 65_536, "num_heads": 16})
    with pytest.raises(UsageError, match=r"describes a model of .* bytes"):
        create_student(name, num_classes=4, pretrained=True)
