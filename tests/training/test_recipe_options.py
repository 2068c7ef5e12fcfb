"""Options that the recipes need: evaluation crop and filter, normalisation, synchronised norms."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from scalekd.cli.commands import export as export_command
from scalekd.cli.train_student import train_student as train_command
from scalekd.errors import UsageError
from scalekd.models.architectures import import_for
from scalekd.pipelines.evaluate import EvaluateConfig, evaluate
from scalekd.pipelines.export import export
from scalekd.pipelines.train_student import train_student
from scalekd.students import create_student
from scalekd.training import TrainConfig, load_trained_student, synchronise_batch_norm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def options(cache: Path, image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "cache": str(cache),
        "data_dir": str(image_folder),
        "model": "test_resnet",
        "objective": "none",
        "epochs": 2,
        "batch_size": 16,
        "workers": 0,
        "amp": "no",
        "lr": 2e-3,
        "output": str(tmp_path / "run"),
    }


def test_crop_filter_and_normalisation_stay_with_the_run(
    options: dict[str, Any], image_folder: Path, tmp_path: Path
) -> None:
    options |= {"crop_pct": 0.6, "interpolation": "bilinear-opencv"}
    options |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    result = train_student(TrainConfig.from_mapping(options))
    run = tmp_path / "run"
    for checkpoint in ("model_best", "last"):
        spec = load_trained_student(run / checkpoint).spec
        assert (spec.crop_pct, spec.interpolation) == (0.6, "bilinear-opencv")
        assert (spec.mean, spec.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    asked = EvaluateConfig(model=str(run / "last"), data_dir=str(image_folder), workers=0)
    found = evaluate(asked)
    assert (found["crop_pct"], found["interpolation"]) == (0.6, "bilinear-opencv")
    assert found["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)
    # Each of the two changes what is measured; the command line's win over the run's.
    for changes in ({"crop_pct": 1.0}, {"interpolation": "bicubic"}):
        other = evaluate(asked.model_copy(update=changes))
        assert other["loss"] != pytest.approx(found["loss"], rel=1e-5)
    export(run, tmp_path / "export", export_format="timm")
    written = json.loads((tmp_path / "export/config.json").read_text())["pretrained_cfg"]
    assert (written["crop_pct"], written["interpolation"]) == (0.6, "bilinear")  # timm's nearest
    assert (written["mean"], written["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("crop_pct", value) for value in (0, 1.5)],
        ("interpolation", "nearest"),
        *[("mean", value) for value in ((0.5, 0.5), (0.5, 0.5, 2.0))],
        ("std", (0.2, 0.0, 0.2)),
    ],
)
def test_impossible_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{name}.* is (not possible|missing)"):
        TrainConfig.from_mapping({"model": "resnet18", "output": "run", name: value})


def test_the_command_line_takes_them(options: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["--crop-pct", "0.7", "--interpolation", "bilinear", "--sync-bn"]
    arguments += ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--no-channels-last"]
    options |= {"epochs": 1}
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    CliRunner().invoke(train_command, arguments, catch_exceptions=False)
    spec = load_trained_student(tmp_path / "run").spec
    assert (spec.crop_pct, spec.interpolation) == (0.7, "bilinear")
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.25,) * 3)
    assert TrainConfig.from_yaml(tmp_path / "run/args.yaml").sync_bn


def processes(count: int, device: torch.device) -> Any:
    return SimpleNamespace(num_processes=count, device=device)


# Norms of three kinds: torch's own, timm's with an activation inside, and none at all.
@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "test_vit"])
def test_every_batch_norm_of_a_student_is_synchronised(model: str) -> None:
    student = create_student(model, num_classes=3, img_size=32 if model == "test_vit" else 64)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    before = [isinstance(part, norms) for part in student.model.modules()]
    names = list(student.model.state_dict())
    images = torch.randn(2, 3, *student.spec.img_size)
    student.eval()
    logits = student(images).logits
    synchronise_batch_norm(student, processes(8, CUDA))
    after = [isinstance(part, nn.SyncBatchNorm) for part in student.model.modules()]
    assert sum(after) == sum(before)
    assert any(after) == (model != "test_vit")
    assert list(student.model.state_dict()) == names
    assert torch.equal(student(images).logits, logits)


def test_several_processes_on_cpus_cannot_synchronise() -> None:
    student = create_student("test_resnet", num_classes=3, img_size=64)
    with pytest.raises(UsageError, match=r"--sync-bn: 2 processes train on CPUs.*--no-sync-bn"):
        synchronise_batch_norm(student, processes(2, CPU))
    without = create_student("test_vit", num_classes=3, img_size=32)
    synchronise_batch_norm(without, processes(2, CPU))  # there is nothing to synchronise


def test_one_process_with_synchronised_norms_trains_as_without(
    options: dict[str, Any], tmp_path: Path
) -> None:
    plain = train_student(TrainConfig.from_mapping(options))
    options |= {"output": str(tmp_path / "synchronised"), "sync_bn": True}
    synchronised = train_student(TrainConfig.from_mapping(options))
    assert synchronised.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=1e-4)
    # The weights open in the plain architecture.
    weights = load_file(tmp_path / "synchronised/last/model.safetensors")
    timm.create_model("test_resnet", num_classes=3).load_state_dict(weights)


def test_mixer_b14_is_the_b16_with_smaller_patches() -> None:
    kwargs = {"num_blocks": 2}
    student = create_student("mixer_b14", num_classes=5, img_size=56, model_kwargs=kwargs)
    assert student.spec.architecture == "mixer_b14_224"
    assert student.spec.levels[1].grid == (4, 4)
    assert student.spec.levels[1].num_channels == 768


def test_an_export_of_mixer_b14_says_what_opens_it(options: dict[str, Any], tmp_path: Path) -> None:
    kwargs = {"num_blocks": 2, "embed_dim": 32}
    options |= {"model": "mixer_b14", "model_kwargs": kwargs, "img_size": 56, "epochs": 1}
    train_student(TrainConfig.from_mapping(options | {"val_split": None}))
    arguments = [str(tmp_path / "run"), "--output", str(tmp_path / "hf"), "--format", "hf"]
    shown = CliRunner().invoke(export_command, arguments, catch_exceptions=False).stdout
    assert "timm has no mixer_b14_224: `import scalekd.models.architectures`" in shown
    opened = "import timm; timm.create_model('local-dir:" + str(tmp_path / "hf") + "')"
    card = (tmp_path / "hf/README.md").read_text()
    assert "import scalekd.models.architectures\nimport timm\n" in card
    for line, code in (("", 1), ("import scalekd.models.architectures; ", 0)):
        done = subprocess.run([sys.executable, "-c", line + opened], capture_output=True)
        assert done.returncode == code, done.stderr
    assert import_for("mixer_b16_224") is None
