"""Files of ``torch.save`` from other programs: tensors are read, nothing in them is run."""

import argparse
import datetime
import os
import pathlib
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalekd.errors import DataError
from scalekd.models.weights import read_state_dict

STATE = {"head.weight": torch.arange(3.0)}


@pytest.mark.parametrize(
    "extra",
    [
        argparse.Namespace(lr=0.1, output=pathlib.Path("x"), sizes=[np.int64(3)]),
        np.float64(71.2),
        np.bool_(True),
        np.arange(3),
        datetime.datetime(2020, 1, 1),
        datetime.timedelta(seconds=1),
        types.SimpleNamespace(a=1),
        torch.device("cpu"),
        torch.float32,
        {1, 2},
        b"bytes",
    ],
)
@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", None])
def test_checkpoints_of_training_scripts_are_read(
    tmp_path: Path, extra: Any, key: str | None
) -> None:
    content = {"args": extra, "epoch": 3} | ({key: STATE} if key else STATE)
    torch.save(content, tmp_path / "last.pth.tar")
    state = read_state_dict(tmp_path / "last.pth.tar")
    assert list(state) == ["head.weight"]
    assert torch.equal(state["head.weight"], STATE["head.weight"])


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    averaged = {"module.head.weight": torch.ones(3)}
    torch.save({"state_dict": STATE, "state_dict_ema": averaged}, tmp_path / "last.pth.tar")
    assert torch.equal(read_state_dict(tmp_path / "last.pth.tar")["head.weight"], torch.ones(3))


class Hostile:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("force", ["0", "1"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_pickled_calls_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, force: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    for function, arguments in (
        (os.mkdir, (str(tmp_path / "planted"),)),
        (eval, ("1",)),
        (exec, ("1",)),
        (np.load, ("x.npy",)),
        (torch.load, ("x.pth",)),
        (getattr, ("text", "upper")),
    ):
        torch.save({"state_dict": STATE, "x": Hostile(function, *arguments)}, tmp_path / name)
        with pytest.raises(DataError, match=r"never loaded.*clean_checkpoint"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "planted").exists()


def test_memory_is_bounded_by_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="larger than its bytes"):
        read_state_dict(tmp_path / "a.pth")
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "b.pth")
    with (
        zipfile.ZipFile(tmp_path / "b.pth") as plain,
        zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(DataError, match="larger than the file"):
        read_state_dict(tmp_path / "c.pth")
    sparse = torch.sparse_coo_tensor(
        torch.zeros(1, 1, dtype=torch.long), [1.0], (10**12,), check_invariants=True
    )
    torch.save({"a": sparse}, tmp_path / "d.pth")
    with pytest.raises(DataError, match="sparse"):
        read_state_dict(tmp_path / "d.pth")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text", None, {"a": 1}])
def test_anything_but_named_tensors_is_one_line(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(DataError) as caught:
        read_state_dict(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)
