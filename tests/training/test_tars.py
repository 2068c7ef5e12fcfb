"""A run is the same from every form of a cache, and needs no image set where one is embedded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalekd.errors import UsageError
from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache
from scalekd.pipelines.train_student import train_student
from scalekd.training import TrainConfig
from scalekd.training.checkpoint import STUDENT_FILE


def run(cache: Path, output: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Weights after two epochs."""
    options = {
        "cache": str(cache),
        "model": "test_resnet",
        "objective": "scalekd",
        "epochs": 2,
        "batch_size": 16,
        "workers": 0,
        "amp": "no",
        "lr": 2e-3,
        "val_split": None,
        "output": str(output),
        **changes,
    }
    train_student(TrainConfig.from_mapping(options))
    weights = load_file(output / "last" / STUDENT_FILE)
    objective = load_file(output / "last/objective.safetensors")
    return {**weights, **{f"objective.{name}": found for name, found in objective.items()}}


def test_weights_are_the_same_from_every_form(
    cache: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder)  # its README.md tells the licence of no embedded images
    expected = run(cache, tmp_path / "zarr", data_dir=str(image_folder))
    for embed in ("none", "source", "view"):
        images = None if embed == "none" else str(image_folder)
        tars = tmp_path / f"{embed}-cache"
        convert_cache(
            ConvertConfig(
                source=str(cache),
                output=str(tars),
                format="webdataset",
                embed=embed,
                data_dir=images,
                workers=0,
            )
        )
        given = {"data_dir": str(image_folder)} if embed == "none" else {}
        found = run(tars, tmp_path / embed, **given)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        facts = json.loads((tmp_path / embed / "last/state.json").read_text())
        assert facts["data_licence"] == ("cc0-1.0" if embed == "none" else None)
    with pytest.raises(UsageError, match="pass --data-dir, so that views of that size"):
        run(tmp_path / "view-cache", tmp_path / "other", img_size=48)
    with pytest.raises(UsageError, match="--data-dir is missing"):
        run(tmp_path / "none-cache", tmp_path / "other")
