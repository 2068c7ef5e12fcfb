"""Training on labelled images alone, from weights of another run, an export or a file."""

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from scalekd.cli.train_student import train_student as train_command
from scalekd.errors import CacheMismatch, DataError, ScaleKDError, UsageError
from scalekd.images import open_dataset
from scalekd.loading.image_loader import ImageLoader
from scalekd.pipelines.configure import train_config
from scalekd.pipelines.evaluate import EvaluateConfig, evaluate
from scalekd.pipelines.export import export
from scalekd.pipelines.report import report
from scalekd.pipelines.train_student import train_student
from scalekd.students import create_student
from scalekd.training import TrainConfig, freeze_parameters
from scalekd.training.module import hold_frozen_norms
from scalekd.views import ViewPolicy

COLOURS = {"blue": (40, 60, 200), "green": (50, 200, 60), "red": (200, 40, 40)}


def coloured(root: Path, classes: Mapping[str, tuple[int, int, int]], *, train: int = 16) -> Path:
    """Class folders of noisy images of one colour each."""
    random = torch.Generator().manual_seed(3)
    for split, count in (("train", train), ("val", 4)):
        for name, colour in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(-30, 30, (40, 48, 3), generator=random)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured(tmp_path_factory.mktemp("fine") / "images", COLOURS)


@pytest.fixture
def options(images: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "data_dir": str(images),
        "model": "test_resnet",
        "objective": "none",
        "img_size": 32,
        "epochs": 2,
        "batch_size": 8,
        "workers": 0,
        "amp": "no",
        "lr": 2e-3,
        "output": str(tmp_path / "run"),
    }


def trained(options: Mapping[str, Any], **changes: Any) -> dict[str, torch.Tensor]:
    config = train_config(None, {**options, **changes})
    train_student(config)
    return load_file(Path(config.output) / "last/model.safetensors")


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def first_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three colours, with a normalisation of its own. Read only."""
    run = tmp_path_factory.mktemp("first") / "run"
    values = {"data_dir": str(images), "model": "test_resnet", "objective": "none", "img_size": 40}
    values |= {"epochs": 1, "batch_size": 8, "workers": 0, "amp": "no", "mean": (0.4, 0.3, 0.2)}
    values |= {"output": str(run), "val_split": None, "model_kwargs": {"drop_path_rate": 0.1}}
    train_student(TrainConfig.from_mapping(values))
    return run


def test_labelled_images_alone_train_evaluate_export_and_report(
    options: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    trained(options, epochs=6)
    with (tmp_path / "run/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["eval_top1"]) > 90
    scores = evaluate(EvaluateConfig(model=str(tmp_path / "run"), data_dir=str(images), workers=0))
    assert scores["top1"] == pytest.approx(max(float(row["eval_top1"]) for row in rows))
    export(tmp_path / "run", tmp_path / "export", export_format="hf")
    card = (tmp_path / "export/README.md").read_text()
    assert "distilled" not in card
    assert json.loads((tmp_path / "export/config.json").read_text())["label_names"] == [*COLOURS]
    (row,) = report([tmp_path / "run"], tmp_path / "report").rows
    assert row.teacher is None


def test_a_folder_whose_weights_are_not_read_is_named(
    options: dict[str, Any], first_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(first_run, tmp_path / "export")
    once = {"epochs": 1, "model": f"local-dir:{tmp_path / 'export'}", "val_split": None}
    note = "the architecture with random weights; --pretrained reads"
    trained(options, **once)
    assert note in capfd.readouterr().err
    as_path = once | {"model": str(tmp_path / "export"), "output": str(tmp_path / "path")}
    trained(options, **as_path)
    assert note in capfd.readouterr().err
    trained(options, **once, pretrained=True, output=str(tmp_path / "two"))
    weights = str(tmp_path / "export/model.safetensors")
    trained(options, **once, initial_checkpoint=weights, output=str(tmp_path / "three"))
    assert note not in capfd.readouterr().err


def test_every_epoch_has_new_views_and_a_resumed_run_sees_the_same(
    options: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    loader = ImageLoader(
        open_dataset(str(images), "train"),
        ViewPolicy.parse("crop"),
        view_size=(24, 32),
        batch_size=48,
    )
    first, second, again = (next(iter(loader.epoch(epoch))) for epoch in (0, 1, 0))
    assert first["pixels"].shape == (48, 3, 24, 32)
    assert torch.equal(first["pixels"], again["pixels"])
    one, other = (
        {batch["pixels"][row].numpy().tobytes() for row in range(48)} for batch in (first, second)
    )
    assert not one & other
    assert first["label"].bincount().tolist() == [16, 16, 16]

    options |= {"sched": "constant", "val_split": None, "epochs": 3, "model_ema": True}
    whole = trained(options)
    options |= {"output": str(tmp_path / "halves"), "resume": "auto"}
    trained(options, epochs=1)
    assert same(trained(options, workers=2), whole)


def test_the_share_of_a_process_and_the_middle_of_an_epoch(images: Path) -> None:
    data, policy = open_dataset(str(images), "train"), ViewPolicy.parse("center:1")
    settings: dict[str, Any] = {"view_size": (16, 16), "batch_size": 8, "seed": 5}
    seen = []
    for rank in (0, 1):
        loader = ImageLoader(data, policy, **settings, rank=rank, world_size=2)
        batches = list(loader.epoch(4))
        assert len(batches) == loader.num_batches == 3
        assert torch.equal(next(iter(loader.epoch(4, start_batch=2)))["label"], batches[2]["label"])
        seen += [view.numpy().tobytes() for batch in batches for view in batch["pixels"]]
    assert len(set(seen)) == len(seen) == 48


def test_views_are_drawn_as_the_options_say(options: dict[str, Any]) -> None:
    plain = trained(options, epochs=1, val_split=None)
    cropped = trained(options, epochs=1, val_split=None, aug="crop:0.9..1", overwrite=True)
    filtered = trained(options, epochs=1, val_split=None, interpolation="bicubic", overwrite=True)
    assert not same(plain, cropped)
    assert not same(plain, filtered)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export", "model", "weights"])
def test_other_classes_get_a_new_head_on_the_old_backbone(
    first_run: Path,
    tmp_path: Path,
    options: dict[str, Any],
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = {"black": (10, 10, 10), "white": (240, 240, 240), "grey": (120, 120, 120)}
    if kind == "weights":  # no names: only another number of classes shows
        other |= {"pink": (250, 150, 150)}
    sources = {"run": first_run, "checkpoint": first_run / "last", "export": tmp_path / "export"}
    sources |= {"weights": tmp_path / "weights.safetensors", "model": tmp_path / "export"}
    if kind in ("export", "model"):
        export(first_run, sources[kind])
    if kind == "weights":
        export(first_run, sources[kind], export_format="safetensors")
    del options["img_size"]
    if kind != "weights":
        del options["model"]  # the run's own
    options |= {"data_dir": str(coloured(tmp_path / "other", other, train=4))}
    options |= {"freeze": ("backbone",), "epochs": 1}
    if kind == "model":
        options |= {"model": str(sources[kind]), "pretrained": True}
    else:
        options |= {"initial_checkpoint": str(sources[kind])}
    if kind == "weights":
        options |= {"img_size": 40}
    after = trained(options)
    before = load_file(first_run / "last/model.safetensors")
    said = capsys.readouterr().err
    assert "starts from random values (fc.weight, fc.bias)" in said
    assert set(after) == set(before)
    moved = {name for name in before if before[name].shape != after[name].shape}
    moved |= {n for n in before.keys() - moved if not torch.equal(before[n], after[n])}
    assert moved == {"fc.weight", "fc.bias"}  # running statistics of frozen norms included
    config = TrainConfig.from_yaml(Path(options["output"]) / "args.yaml")
    state = json.loads((tmp_path / "run/last/state.json").read_text())
    assert state["class_names"] == sorted(other)
    assert state["student"]["img_size"] == [40, 40]
    if kind in ("run", "checkpoint"):
        assert config.mean == (0.4, 0.3, 0.2)
    if kind != "weights":
        assert state["student"]["mean"] == [0.4, 0.3, 0.2]
    assert not state["student"]["model_kwargs"].get("drop_path_rate")


def test_the_same_classes_keep_their_head(first_run: Path, options: dict[str, Any]) -> None:
    options |= {"initial_checkpoint": str(first_run), "lr": 1e-12, "weight_decay": 0, "epochs": 1}
    after = trained(options, img_size=40)
    before = load_file(first_run / "last/model.safetensors")
    assert torch.allclose(after["fc.weight"], before["fc.weight"], atol=1e-6)


def test_another_size_of_a_transformer(options: dict[str, Any], tmp_path: Path) -> None:
    trained(options, model="test_vit", epochs=1, val_split=None)
    del options["model"]
    options |= {"initial_checkpoint": str(tmp_path / "run"), "output": str(tmp_path / "larger")}
    larger = trained(options, img_size=(48, 64), epochs=1, layer_decay=0.7, val_split=None)
    assert larger["pos_embed"].shape[1] == 1 + 3 * 4
    state = json.loads((tmp_path / "larger/last/state.json").read_text())
    assert state["student"]["img_size"] == [48, 64]


def test_weights_without_a_head_fit_a_student_with_one(
    options: dict[str, Any], first_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(first_run / "last/model.safetensors")
    backbone = {name: t for name, t in weights.items() if not name.startswith("fc.")}
    save_file(backbone, tmp_path / "backbone.safetensors")
    options |= {"initial_checkpoint": str(tmp_path / "backbone.safetensors"), "epochs": 1}
    after = trained(options, num_classes=5, freeze=("backbone",))
    assert after["fc.weight"].shape[0] == 5
    assert all(torch.equal(after[name], backbone[name]) for name in backbone)
    assert "it has no classifier" in capsys.readouterr().err


def test_frozen_parts_stay_as_they_were() -> None:
    model = create_student("test_resnet", num_classes=3, img_size=32).model
    freeze_parameters(model, ["layer[12]", "bn1"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"layer1", "layer2", "bn1"}
    freeze_parameters(model, ["backbone"])
    free = [name for name, p in model.named_parameters() if p.requires_grad]
    assert free == ["fc.weight", "fc.bias"]
    model.train()
    hold_frozen_norms(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    with pytest.raises(UsageError, match="no classifier that is left to train"):
        freeze_parameters(model, ["fc", "backbone"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"objective": "kd"}, UsageError, "--cache is missing: --objective kd learns from a teac"),
        ({"objective": "scalekd"}, UsageError, "train on labels alone by --objective none"),
        ({"data_dir": None}, UsageError, "--data-dir is missing"),
        ({"targets": "more"}, UsageError, "--targets: applies to a teacher's cache"),
        ({"online": True}, UsageError, "--online: applies to a teacher's cache"),
        ({"val_cache": "x"}, UsageError, "--val-cache: applies to a teacher's cache"),
        ({"logits_from": ("a",)}, UsageError, "--logits-from: applies to a teacher's cache"),
        ({"class_map": "none"}, UsageError, "--class-map: applies to a teacher's cache"),
        ({"aug": "crap"}, UsageError, "the nearest is crop"),
        ({"labels": "none"}, DataError, "has a label with --labels none"),
        ({"num_classes": 2}, DataError, "labels run up to 2"),
        ({"num_classes": 0}, UsageError, "--num-classes 0: --objective none trains a classifier"),
        ({"batch_size": 49}, UsageError, "48 labelled images, fewer than one batch of 49"),
        ({"split": "test"}, DataError, "test"),
        ({"freeze": ("head",)}, UsageError, "--freeze head: no parameter of the student"),
        ({"initial_checkpoint": "/nowhere"}, UsageError, "/nowhere: there is no such file"),
        ({"initial_checkpoint": "/"}, UsageError, "neither a file, nor a training run, nor"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_the_first_forward(
    options: dict[str, Any], changes: dict[str, Any], error: type[ScaleKDError], message: str
) -> None:
    with pytest.raises(error) as raised:
        trained(options, **changes)
    assert message in str(raised.value)
    assert not (Path(options["output"]) / "last").exists()


def test_a_cache_decides_its_own_views(cache: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--aug: is for training without a cache"):
        trained(options, cache=str(cache), aug="crop")


def test_images_without_a_label_are_left_out_and_counted(
    options: dict[str, Any],
    tmp_path: Path,
    write_tar: Callable[..., Path],
    image_bytes: dict[int, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    members = {}
    for number in range(20):
        members[f"{number:02d}.{'png' if number % 5 == 0 else 'jpg'}"] = image_bytes[number]
        if number % 4:
            members[f"{number:02d}.cls"] = b"%d" % (number % 3)
    write_tar(tmp_path / "tars/train-0.tar", members)
    write_tar(tmp_path / "tars/val-0.tar", members)
    bare = {name: image for name, image in members.items() if not name.endswith("cls")}
    write_tar(tmp_path / "tars/bare-0.tar", bare)
    options |= {"data_dir": str(tmp_path / "tars"), "batch_size": 15, "epochs": 1}
    trained(options, val_split=None)
    assert "5 of 20 images have no label and are left out, such as '00'" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/last/state.json").read_text())["samples_viewed"] == 15
    trained(options, val_split="val", output=str(tmp_path / "validated"))
    assert "val-*.tar: 5 of 20 images have no label and are left out" in capsys.readouterr().err
    assert "eval_top1" in (tmp_path / "validated/summary.csv").read_text()
    with pytest.raises(DataError, match=r"none of its 20 images has a label.*--val-split none"):
        trained(options, val_split="bare", output=str(tmp_path / "bare"))


def test_a_run_is_not_continued_on_other_images(options: dict[str, Any], tmp_path: Path) -> None:
    trained(options, epochs=1, val_split=None)
    other = coloured(tmp_path / "other", COLOURS, train=9)
    with pytest.raises(CacheMismatch, match="training images"):
        trained(options, data_dir=str(other), resume="auto", val_split=None)


def test_a_run_that_claims_to_be_huge_is_not_built(
    first_run: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(first_run, tmp_path / "evil"))
    for folder in ("last", "model_best"):
        path = run / folder / "state.json"
        state = json.loads(path.read_text())
        state["student"]["model_kwargs"] = {"base_width": 100_000}
        state.pop("digest")
        path.write_text(json.dumps(state))
    del options["model"]
    with pytest.raises(DataError, match="the student cannot be read"):
        trained(options, initial_checkpoint=str(run))


def test_the_command_line_needs_no_model_beside_a_run(
    first_run: Path, images: Path, tmp_path: Path
) -> None:
    arguments = ["--initial-checkpoint", first_run, "--objective", "none", "--num-classes", 4]
    arguments += ["--data-dir", images, "-b", 8, "-j", 0, "--epochs", 1, "--output", tmp_path / "r"]
    result = CliRunner().invoke(train_command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    state = json.loads((tmp_path / "r/last/state.json").read_text())
    assert state["student"]["num_classes"] == 4
    assert state["student"]["architecture"] == "test_resnet"


def test_weights_that_do_not_name_their_model_are_refused_in_one_line(
    first_run: Path, tmp_path: Path
) -> None:
    weights = first_run / "model_best" / "model.safetensors"
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "nowhere: there is no such file or folder"),
        (weights, "model.safetensors: holds weights alone; name their student by --model"),
        (tmp_path / "empty", "empty: neither a file, nor a training run, nor a folder"),
    ):
        with pytest.raises(UsageError, match=f"--initial-checkpoint .*{message}"):
            train_config(None, {"initial_checkpoint": str(path), "output": str(tmp_path / "run")})
