"""Features of several teachers at once: their losses added, with projectors and weights each."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.pipelines._source_options import ExtendConfig
from scalekd.pipelines.configure import train_config
from scalekd.pipelines.extend_cache import extend_cache
from scalekd.pipelines.train_student import train_student
from scalekd.training import TrainConfig

Train = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def extended(cache: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cache``, and features of a CNN without a tail under a name with a dot."""
    root = Path(shutil.copytree(cache, tmp_path_factory.mktemp("several") / "cache"))
    for name, model in (("vit.2", "test_vit2"), ("values", "test_resnet")):
        config = ExtendConfig(
            cache=root,
            data_dir=str(image_folder),
            name=name,
            model=model,
            pretrained=False,
            stages=(4,),
            codec="float16",
            workers=0,
        )
        assert extend_cache(config).complete
    return root


@pytest.fixture
def train(extended: Path, image_folder: Path, tmp_path: Path) -> Train:
    """Trains one epoch; returns its losses."""

    def train(*distillation: tuple[str, Any], **changes: Any) -> dict[str, float]:
        options = {
            "cache": str(extended),
            "data_dir": str(image_folder),
            "model": "test_resnet",
            "objective": "features",
            "distillation": distillation,
            "epochs": 1,
            "batch_size": 16,
            "workers": 0,
            "amp": "no",
            "lr": 1e-9,
            "sched": "constant",
            "val_split": None,
            "output": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"),
            **changes,
        }
        result = train_student(train_config(None, options))
        with (Path(result.output) / "summary.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {n.removeprefix("train_"): float(v) for n, v in rows[-1].items() if "loss" in n}

    return train


FEATURE_TERMS = {f"stage{s}_{v}_loss" for s in (3, 4) for v in ("spatial", "frequency")}


def test_losses_of_teachers_are_added_under_their_names(train: Train, tmp_path: Path) -> None:
    angle = ("summary", "direction")  # a contrast starts anywhere
    losses = train(angle, targets="base,vit.2,values")
    terms = {*FEATURE_TERMS, "summary_loss"}
    names = {f"{teacher}_{term}" for teacher in ("base", "vit.2", "values") for term in terms}
    assert losses.keys() == {"loss", *names}
    assert losses["loss"] == pytest.approx(sum(losses[name] for name in names), rel=1e-4)
    # Each is what it is alone, but for the random start of its projectors.
    alone = train(angle, targets="values")
    assert alone.keys() == {"loss", *terms}
    for term in terms:
        assert losses[f"values_{term}"] == pytest.approx(alone[term], rel=0.2)
    tensors = load_file(tmp_path / "run0/last/objective.safetensors")
    owners = {name.split(".")[1] for name in tensors}
    assert owners == {"teacher_base", "teacher_vit%2E2", "teacher_values"}
    state = json.loads((tmp_path / "run0/last/state.json").read_text())
    assert len(state["teacher"].split(", ")) == 3


def test_every_teacher_has_weights_of_its_own(train: Train) -> None:
    plain = train(targets="base,vit.2")
    halved = train(("vit.2.weight", 0.5), targets="base,vit.2")
    for name, value in plain.items():
        factor = 0.5 if name.startswith("vit.2_") else 1
        if name != "loss":
            assert halved[name] == pytest.approx(factor * value, rel=1e-5), name
    fewer = train(
        ("vit.2.summary_weight", 0),
        ("vit.2.stage3.spatial_weight", 0),
        ("base.frequency", False),
        ("weight", 2),
        targets="base,vit.2",
    )
    assert fewer.keys() == {
        "loss",
        "base_stage3_spatial_loss",
        "base_stage4_spatial_loss",
        "base_summary_loss",
        "vit.2_stage3_frequency_loss",
        "vit.2_stage4_spatial_loss",
        "vit.2_stage4_frequency_loss",
    }
    assert fewer["base_summary_loss"] == pytest.approx(2 * plain["base_summary_loss"], rel=0.2)
    without = train(("vit.2.weight", 0), targets="base,vit.2")
    assert {name for name in without if name.startswith("vit.2")} == set()


def test_the_published_objective_takes_logits_of_the_first_that_has_any(train: Train) -> None:
    losses = train(targets="vit.2,base", objective="scalekd")
    assert {"task_loss", "kd_loss", "vit.2_stage3_spatial_loss"} <= losses.keys()
    assert "vit.2_summary_loss" not in losses


def test_a_run_with_several_teachers_resumes_to_the_bit(
    train: Train, tmp_path: Path, extended: Path
) -> None:
    options: dict[str, Any] = {"targets": "base,values", "lr": 1e-3}
    train(**options, epochs=2, output=str(tmp_path / "whole"))
    for epochs in (1, 2):
        train(**options, epochs=epochs, output=str(tmp_path / "halves"), resume="auto")
    for name in ("model", "objective"):
        whole, halves = (
            load_file(tmp_path / run / f"last/{name}.safetensors") for run in ("whole", "halves")
        )
        assert whole.keys() == halves.keys()
        assert all(torch.equal(whole[tensor], halves[tensor]) for tensor in whole)
    with pytest.raises(CacheMismatch, match="teacher's weights"):
        train(targets="base,vit.2", epochs=3, output=str(tmp_path / "halves"), resume="auto")


def test_several_live_teachers_give_what_their_caches_give(train: Train) -> None:
    # float16 features against the teachers' own float32, of teachers in an order of their own.
    options: dict[str, Any] = {"targets": "values,base,vit.2", "objective": "scalekd-light"}
    cached = train(("summary_weight", 1), **options)
    online = train(("summary_weight", 1), **options, online=True)
    assert {"kd_loss", "values_stage3_spatial_loss", "vit.2_summary_loss"} <= cached.keys()
    assert online.keys() == cached.keys()
    for name in cached:
        assert online[name] == pytest.approx(cached[name], rel=1e-2), name
    named = train(**options, online=True, teacher=" test_resnet,,")
    assert named["kd_loss"] == pytest.approx(cached["kd_loss"], rel=1e-2)
    with pytest.raises(CacheMismatch, match=r"values: was made by test_resnet.*--teacher"):
        train(**options, online=True, teacher="test_vit,,")


def test_a_live_teacher_whose_logits_do_not_fit_is_refused(
    train: Train, extended: Path, image_folder: Path, tmp_path: Path
) -> None:
    """The first with a classifier gives the logits, also where its cache keeps none."""
    root = Path(shutil.copytree(extended, tmp_path / "cache"))
    classes = tmp_path / "classes.txt"
    classes.write_text("one\ntwo\n")
    for name, num_classes, names in (
        ("headless", 0, None),
        ("two", 2, classes),
        ("three", 3, None),
    ):
        config = ExtendConfig(
            cache=root,
            data_dir=str(image_folder),
            name=name,
            model="test_vit",
            pretrained=False,
            model_kwargs={"num_classes": num_classes},
            teacher_classes=names,
            stages=(4,),
            logits="none",
            workers=0,
        )
        assert extend_cache(config).complete
    options: dict[str, Any] = {"cache": str(root), "online": True, "objective": "scalekd-light"}
    for targets, error, message in (
        ("headless", UsageError, r"live teacher \(test_vit\.\w+\) has no classifier.*kd=false"),
        ("two", DataError, "is not a class of the teacher"),
        ("headless,two", DataError, "is not a class of the teacher"),
    ):
        with pytest.raises(error, match=message) as raised:
            train(**options, targets=targets)
        assert "\n" not in str(raised.value)
    losses = train(**options, targets="headless,three")
    assert losses["kd_loss"] > 0
    train(("kd", False), **options, targets="headless")


def test_their_feature_losses_are_validated_together(
    train: Train, extended: Path, image_folder: Path, tmp_path: Path
) -> None:
    options = {"targets": "base,values", "val_split": "train"}
    losses = train(**options, val_cache=str(extended))
    assert losses["eval_feature_loss"] > 0
    other = Path(shutil.copytree(extended, tmp_path / "other"))
    shutil.rmtree(other / "extensions/values")
    shutil.copytree(other / "extensions/vit.2", other / "extensions/values")
    with pytest.raises(CacheMismatch, match=r"--val-cache .*: was made by the teacher test_vit2"):
        train(**options, val_cache=str(other))


@pytest.mark.parametrize(
    ("distillation", "changes", "message"),
    [
        ((), {"targets": "base,nobody"}, "has no extension 'nobody'"),
        ((), {"targets": "base,base"}, "names, each once"),
        ((), {"targets": "base,"}, "names, each once"),
        (
            (),
            {"targets": "base,values", "online": True, "teacher": "test_vit,test_resnet,x"},
            "--teacher test_vit,test_resnet,x: names 3 teachers, and --targets 2",
        ),
        (
            (),
            {"targets": "base,values", "online": True, "teacher_checkpoint": "teacher.pt"},
            "--teacher-checkpoint teacher.pt: names 1 teachers",
        ),
        ((("dinov3.weight", 1),), {"targets": "base,values"}, "dinov3: is neither a setting nor a"),
        ((("values.wieght", 1),), {"targets": "base,values"}, "values.wieght: .*'weight'"),
        ((("values.kd_alpha", 1),), {"targets": "base,values"}, "is no setting of one teacher"),
        ((("values.weight", -1),), {"targets": "base,values"}, r"values.weight: .*equal to 0(?!;)"),
        ((("values.tpp", True),), {"targets": "base,values"}, "has no tail"),
        ((("weight", 0),), {"targets": "base,values"}, "every feature loss"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line_before_training(
    train: Train, tmp_path: Path, distillation: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        train(*distillation, **changes)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*/last"))


def test_settings_of_teachers_survive_their_file(tmp_path: Path) -> None:
    config = train_config(
        None,
        {
            "model": "test_resnet",
            "output": str(tmp_path),
            "distillation": [
                ("dinov3.weight", 0.5),
                ("dinov3.stage4.num_heads", 2),
                ("tpp", False),
            ],
        },
    )
    (tmp_path / "args.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "args.yaml") == config
    own = config.distillation.for_teacher("dinov3")
    assert (own.weight, own.stage4.num_heads, own.tpp) == (0.5, 2, False)
    assert "tpp" in own.model_fields_set
    assert config.distillation.for_teacher("base").weight == 1


def test_a_batch_of_one_has_nothing_to_contrast(train: Train, tmp_path: Path) -> None:
    for targets in ("base", "base,values"):
        with pytest.raises(UsageError, match="--batch-size 1: the summary loss tells the images"):
            train(targets=targets, batch_size=1)
    assert not list(tmp_path.rglob("summary.csv"))  # before training
    views = (("spatial", False), ("frequency", False))
    assert train(
        ("summary", "standardised"), *views, targets="base", batch_size=1, model="test_vit"
    )
