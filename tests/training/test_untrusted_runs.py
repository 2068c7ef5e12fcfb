"""Run folders from someone else: their documents build nothing but the model of their weights."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scalekd.errors import DataError, UsageError
from scalekd.export.timm import export_student
from scalekd.models.build import build_described, create_on_meta
from scalekd.training import Trainer, load_trained_student
from scalekd.training import checkpoint as module

Make = Callable[..., Trainer]


@pytest.fixture
def run(make_trainer: Make, tmp_path: Path) -> Path:
    make_trainer(tmp_path / "run", epochs=1).fit()
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection was asked for: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def forge(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    for folder in (run / "model_best", run / "last"):
        state = json.loads((folder / "state.json").read_text())
        change(state)
        state["files"] = {name: module._digest(folder / name) for name in state["files"]}
        del state["digest"]
        state["digest"] = module._digest_of(state)
        (folder / "state.json").write_text(json.dumps(state))


def test_an_unchanged_run_opens(run: Path) -> None:
    forge(run, lambda state: None)
    assert load_trained_student(run).model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    "architecture",
    [
        "hf-hub:owner/name",
        "local-dir:/tmp",
        "../x",
        "test_resnet.r160_in1k",
        "nobody",
        "",
        "x" * 9000,
    ],
)
def test_only_architectures_of_timm_are_built(run: Path, architecture: str) -> None:
    forge(run, lambda state: state["student"].update(architecture=architecture))
    with pytest.raises(DataError, match="student cannot be read") as caught:
        load_trained_student(run)
    assert len(str(caught.value)) < 1000 + len(str(run))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained_cfg": "local-dir:/tmp"},
        {"pretrained_cfg_overlay": [1]},
        {"pretrained_strict": False},
        {"cache_dir": "/tmp"},
        {"features_only": True},
        {"pruned": True},
        {"scriptable": True},
        {"in_chans": 4},
        {"model_cfg": "x"},
        {"kwargs_filter": ["num_classes"]},
        {"nobody_knows": 1},
        {"__class__": 1},
        {"layers": [100_000] * 4},
        {"layers": [10**15] * 4},
        {"layers": [[[[[[1]]]]]]},
        {"layers": [1] * 10_000},
        {"layers": "x" * 10_000},
        {"base_width": 10**6},
        {"stem_width": -1},
        {"num_classes": 10**6},
        {"act_layer": "exit"},
        {"block": "os.system"},
        {"drop_rate": float("inf")},
    ],
)
def test_arguments_of_a_document_are_bounded(run: Path, kwargs: dict[str, Any]) -> None:
    forge(run, lambda state: state["student"]["model_kwargs"].update(kwargs))
    started = time.process_time()
    with pytest.raises(DataError, match="student cannot be read") as caught:
        load_trained_student(run)
    assert time.process_time() - started < 20
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(run))


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": [10**7, 10**7]},
        {"img_size": [0, 32]},
        {"mean": [0, 0, float("nan")]},
        {"std": [1, 1, 0]},
        {"crop_pct": 0},
        {"num_classes": 10**9},
        {"num_classes": -1},
        {"levels": []},
        {"more": 1},
        {"model_kwargs": [1]},
    ],
)
def test_fields_of_a_document_are_bounded(run: Path, changes: dict[str, Any]) -> None:
    forge(run, lambda state: state["student"].update(changes))
    with pytest.raises(DataError, match="student cannot be read"):
        load_trained_student(run)


@pytest.mark.parametrize("names", ["dark", [1, 2, 3, 4], ["x" * 5000], {"a": 1}, [["a"]]])
def test_class_names_of_a_document_are_bounded(run: Path, names: Any) -> None:
    forge(run, lambda state: state.update(class_names=names))
    with pytest.raises(DataError, match="class_names"):
        load_trained_student(run)


@pytest.mark.parametrize("student", [None, 1, [], {}, "x"])
def test_a_document_without_a_student_is_one_line(run: Path, student: Any) -> None:
    forge(run, lambda state: state.update(student=student))
    with pytest.raises(DataError, match="student cannot be read"):
        load_trained_student(run)


def test_weights_of_other_shapes_take_no_memory(run: Path) -> None:
    path = run / "model_best/model.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, path)
    forge(run, lambda state: None)
    with pytest.raises(DataError, match="the weights are not those of test_resnet"):
        load_trained_student(run)


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [
        ("beit_base_patch16_224", {"img_size": 100_000}),
        ("swin_tiny_patch4_window7_224", {"window_size": 100_000, "img_size": 100_000}),
        ("vit_tiny_patch16_224", {"depth": 1_000_000}),
        ("vit_tiny_patch16_224", {"mlp_ratio": 1e6, "embed_dim": 1_000_000}),
        ("vit_tiny_patch16_224", {"patch_size": 0}),
        ("mixer_b16_224", {"num_blocks": 1_000_000}),
        ("convnext_tiny", {"depths": [1_000_000] * 4}),
    ],
)
def test_construction_is_bounded(architecture: str, kwargs: dict[str, Any]) -> None:
    started = time.process_time()
    with pytest.raises(UsageError) as caught:
        build_described(architecture, kwargs, {})
    assert time.process_time() - started < 30
    assert "\n" not in str(caught.value)


def test_computed_tables_count_towards_the_limit() -> None:
    kwargs = {"window_size": 96, "img_size": 768}
    empty = create_on_meta("swin_tiny_patch4_window7_224", kwargs)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    with pytest.raises(UsageError, match="would compute tables of"):
        build_described("swin_tiny_patch4_window7_224", kwargs, shapes)


@pytest.mark.parametrize(
    "facts",
    [
        {"settings": []},
        {"settings": {"recipe": 5}},
        {"settings": {"a": "x" * 300_000}},
        {"settings": {"a": json.loads("[" * 30 + "]" * 30)}},
        {"software": "1.0"},
        {"software": {"scalekd": ["1"]}},
        {"metrics": {"eval_top1": "many"}},
        {"metrics": {"eval_top1": float("nan")}},
        {"logits_of": 3},
        {"teacher": {"a": 1}},
        {"teacher": "x" * 20_000},
        {"objective": ["kd"]},
    ],
)
def test_values_of_a_document_are_checked(run: Path, facts: dict[str, Any]) -> None:
    forge(run, lambda state: state.update(facts))
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_trained_student(run)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(run))


def test_a_card_shows_hostile_text_as_text(run: Path, tmp_path: Path) -> None:
    hostile = "x | y\n---\nlicense: mit\n<script>$\\frac{$\x1b[31m"
    facts = {
        "objective": "kd",
        "teacher": hostile,
        "teacher_note": hostile,
        "data_licence": hostile,
    }
    forge(run, lambda state: state.update(facts, settings={"recipe": hostile, "a": hostile}))
    export_student(load_trained_student(run), tmp_path / "card", export_format="hf")
    card = (tmp_path / "card/README.md").read_text()
    assert "<script>$" not in card.partition("## Settings")[0]
    assert "license: mit" not in card.splitlines()
    assert "\x1b" not in card


@pytest.mark.parametrize("content", [b"epoch\n\xff", b"", b"epoch,train_loss\n0,inf\n"])
def test_a_card_of_a_damaged_summary_is_one_line(run: Path, tmp_path: Path, content: bytes) -> None:
    (run / "summary.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"summary\.csv"):
        export_student(load_trained_student(run), tmp_path / "card", export_format="hf")
    assert not (tmp_path / "card").exists()
