import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from timm.models.vision_transformer import Block

from scalekd.cache import open_cache
from scalekd.cli.commands import evaluate as evaluate_command
from scalekd.cli.commands import export as export_command
from scalekd.cli.train_student import train_student as train_command
from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.pipelines.configure import train_config
from scalekd.pipelines.evaluate import EvaluateConfig, evaluate
from scalekd.pipelines.export import export
from scalekd.pipelines.train_student import train_student
from scalekd.training import TrainConfig


@pytest.fixture
def options(cache: Path, image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "cache": str(cache),
        "data_dir": str(image_folder),
        "model": "test_resnet",
        "img_size": None,
        "epochs": 2,
        "batch_size": 16,
        "workers": 0,
        "amp": "no",
        "lr": 2e-3,
        "output": str(tmp_path / "run"),
    }


def last_row(run: Path) -> dict[str, str]:
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))[-1]


_ALL_TERMS = {"task_loss", "kd_loss"} | {
    f"stage{s}_{v}_loss" for s in (3, 4) for v in ("spatial", "frequency")
}


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        ("none", {"task_loss"}),
        ("kd", {"task_loss", "kd_loss"}),
        ("scalekd", _ALL_TERMS),
        ("scalekd-light", _ALL_TERMS),
    ],
)
def test_every_objective_trains_from_one_cache(
    options: dict[str, Any], tmp_path: Path, objective: str, terms: set[str]
) -> None:
    result = train_student(TrainConfig.from_mapping({**options, "objective": objective}))
    assert result.samples_viewed == 2 * 48
    row = last_row(tmp_path / "run")
    assert {name for name in row if name.endswith("_loss") and name.startswith("train_")} == {
        "train_loss",
        *(f"train_{term}" for term in terms),
    }
    assert float(row["eval_num_samples"]) == 19
    files = load_file(tmp_path / "run/last/objective.safetensors")
    assert bool(files) == (objective in ("scalekd", "scalekd-light"))
    assert not any("tail" in name for name in files)


def test_a_light_run_resumes_and_exports_like_any_other(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"objective": "scalekd-light", "sched": "constant", "val_split": None}
    whole = train_student(TrainConfig.from_mapping(options))
    options |= {"output": str(tmp_path / "halves"), "resume": "auto"}
    for epochs in (1, 2):
        halves = train_student(TrainConfig.from_mapping({**options, "epochs": epochs}))
    assert halves.metrics["train_loss"] == whole.metrics["train_loss"]
    first, second = (
        load_file(tmp_path / run / "last/objective.safetensors") for run in ("run", "halves")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    export(tmp_path / "run", tmp_path / "export", export_format="hf")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "scalekd-light" in card
    assert "distilled from" in card


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it traces
def test_projectors_compile(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"epochs": 1, "val_split": None}
    plain = train_student(TrainConfig.from_mapping(options)).metrics
    options |= {"output": str(tmp_path / "compiled"), "torchcompile": "eager"}
    compiled = train_student(TrainConfig.from_mapping(options)).metrics
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
    first, second = (
        load_file(tmp_path / run / "last/objective.safetensors") for run in ("run", "compiled")
    )
    assert first.keys() == second.keys()


def test_a_run_goes_on_after_an_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"objective": "kd", "model_ema": True, "sched": "constant", "epochs": 3}
    train_student(TrainConfig.from_mapping(options))
    options |= {"output": str(tmp_path / "broken"), "resume": "auto"}
    for epochs in (1, 3):
        train_student(TrainConfig.from_mapping({**options, "epochs": epochs}))
    for name in ("model.safetensors", "ema.safetensors"):
        whole, broken = (load_file(tmp_path / run / "last" / name) for run in ("run", "broken"))
        assert all(torch.equal(whole[tensor], broken[tensor]) for tensor in whole)
    with (tmp_path / "broken/summary.csv").open() as file:
        assert [row["eval_num_samples"] for row in csv.DictReader(file)] == ["19"] * 3


def test_a_student_learns_the_colours_of_images(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"objective": "none", "epochs": 8, "batch_size": 8, "eval_interval": 8}
    assert train_student(TrainConfig.from_mapping(options)).metrics["eval_top1"] > 90


def test_online_and_cached_training_agree(options: dict[str, Any], tmp_path: Path) -> None:
    # float16 features against the teacher's own float32: relative difference 2**-11.
    weights = {"spatial_weight": 0.08, "frequency_weight": 0.06}
    published = {"stage3": weights, "stage4": weights}
    options |= {"epochs": 1, "val_split": None, "distillation": published}
    cached = train_student(TrainConfig.from_mapping(options)).metrics
    options |= {"output": str(tmp_path / "online"), "online": True}
    online = train_student(TrainConfig.from_mapping(options)).metrics
    for name in cached:
        if name.endswith("_loss"):
            assert online[name] == pytest.approx(cached[name], rel=2e-3), name


def test_a_live_teacher_sees_its_own_size_beside_a_student_of_another(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"epochs": 1, "val_split": None, "img_size": 48}
    cached = train_student(TrainConfig.from_mapping(options)).metrics
    options |= {"output": str(tmp_path / "online"), "online": True}
    online = train_student(TrainConfig.from_mapping(options)).metrics
    for name in cached:
        if name.endswith("_loss"):
            assert online[name] == pytest.approx(cached[name], rel=1e-2), name


def test_recomputing_the_tail_changes_no_bit(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    run = Block.forward

    def count(self: Block, *arguments: Any, **keywords: Any) -> Any:
        forwards[-1] += 1
        return run(self, *arguments, **keywords)

    monkeypatch.setattr(Block, "forward", count)
    for name, checkpointed in (("kept", False), ("recomputed", True)):
        forwards.append(0)
        options |= {"epochs": 1, "val_split": None, "output": str(tmp_path / name)}
        train_student(TrainConfig.from_mapping({**options, "tail_checkpointing": checkpointed}))
    # Once when each of the three batches goes forward through the two blocks, once backward.
    assert forwards == [6, 12]
    for file in ("model.safetensors", "objective.safetensors"):
        kept, again = (load_file(tmp_path / run / "last" / file) for run in ("kept", "recomputed"))
        assert all(torch.equal(kept[tensor], again[tensor]) for tensor in kept)


def test_another_teacher_than_the_caches_is_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    torch.save(model.state_dict(), tmp_path / "other.pt")
    options |= {"online": True, "teacher_checkpoint": str(tmp_path / "other.pt")}
    with pytest.raises(CacheMismatch, match=r"with weights .* and the live teacher has"):
        train_student(TrainConfig.from_mapping(options))
    assert not (tmp_path / "run/last").exists()


def test_impossible_options_are_refused_before_training(
    options: dict[str, Any], tmp_path: Path, image_folder: Path
) -> None:
    def refused(kind: type[Exception], match: str, **changes: object) -> None:
        with pytest.raises(kind, match=match):
            train_student(TrainConfig.from_mapping({**options, **changes}))
        assert not (tmp_path / "run").exists()

    refused(UsageError, "--cache is missing", cache=None)
    refused(DataError, "no cache at", cache=str(tmp_path / "nowhere"))
    refused(UsageError, "--data-dir is missing", data_dir=None)
    refused(DataError, "--val-split none", val_split="test")
    refused(UsageError, "resnet", model="resnot18")
    refused(UsageError, "smaller", batch_size=64)
    refused(UsageError, "--teacher: .* --online", teacher="test_vit")
    refused(UsageError, "--teacher-checkpoint: .* --online", teacher_checkpoint="teacher.pt")
    refused(UsageError, "has no such|no parameter of the student", freeze=["layer9"])
    refused(UsageError, "compares classes one by one", num_classes=7)
    refused(UsageError, "neither a file, nor a training run", initial_checkpoint=str(image_folder))


def test_a_corrupt_validation_image_costs_no_epoch(
    options: dict[str, Any], tmp_path: Path, image_folder: Path
) -> None:
    damaged = shutil.copytree(image_folder, tmp_path / "images")
    (damaged / "val/red/3.png").write_bytes(b"no image")
    options |= {"objective": "kd", "epochs": 1, "resume": "auto"}
    broken = TrainConfig.from_mapping({**options, "data_dir": str(damaged)})
    with pytest.raises(DataError, match=r"red/3.png: .* Replace or remove it; only cache-teacher "):
        train_student(broken)
    shutil.copy(image_folder / "val/red/3.png", damaged / "val/red/3.png")
    assert train_student(broken).samples_viewed == 48
    whole = TrainConfig.from_mapping({**options, "output": str(tmp_path / "whole")})
    train_student(whole)
    first, second = (last_row(tmp_path / run) for run in ("whole", "run"))
    for name in ("train_loss", "eval_loss", "eval_top1", "lr", "samples_viewed"):
        assert first[name] == second[name], name


def test_a_run_is_continued_with_its_own_teacher_from_a_moved_cache(
    options: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    options |= {"objective": "kd", "val_split": None, "resume": "auto"}
    train_student(TrainConfig.from_mapping({**options, "epochs": 1}))
    options["cache"] = str(shutil.copytree(cache, tmp_path / "moved"))
    assert train_student(TrainConfig.from_mapping(options)).epochs == 2
    state = tmp_path / "run/last/state.json"
    facts = json.loads(state.read_text())
    facts["teacher_weights_sha256"] = 64 * "0"
    del facts["digest"]
    state.write_text(json.dumps(facts))
    with pytest.raises(CacheMismatch, match="teacher's weights are 000000000000…"):
        train_student(TrainConfig.from_mapping({**options, "epochs": 3}))


def test_another_runs_weights_start_a_new_run(options: dict[str, Any], tmp_path: Path) -> None:
    first = train_student(TrainConfig.from_mapping({**options, "objective": "none"}))
    again = {**options, "output": str(tmp_path / "second"), "objective": "none", "epochs": 1}
    second = train_student(TrainConfig.from_mapping({**again, "initial_checkpoint": first.output}))
    cold = {**again, "output": str(tmp_path / "cold")}
    assert (
        second.metrics["train_loss"]
        < train_student(TrainConfig.from_mapping(cold)).metrics["train_loss"]
    )


def test_weights_for_other_classes_leave_the_head_new(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train_student(TrainConfig.from_mapping({**options, "objective": "none", "epochs": 1}))
    same = {**options, "output": str(tmp_path / "same"), "objective": "none", "epochs": 1}
    train_student(TrainConfig.from_mapping({**same, "initial_checkpoint": first.output}))
    assert "left out" not in capsys.readouterr().err
    for folder in Path(first.output).glob("*/state.json"):
        state = json.loads(folder.read_text())
        state["class_names"] = ["cat", "dog", "bird"]
        del state["digest"]
        folder.write_text(json.dumps(state))
    others = {**same, "output": str(tmp_path / "others")}
    train_student(TrainConfig.from_mapping({**others, "initial_checkpoint": first.output}))
    said = capsys.readouterr().err
    assert "its classifier was trained on other classes and is left out" in said


def test_a_student_is_trained_exported_and_opened_as_a_backbone(
    options: dict[str, Any], tmp_path: Path, image_folder: Path
) -> None:
    run, folder = tmp_path / "run", tmp_path / "exported"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value]
    flags += ["--distillation", "stage3.softmax_scale=1", "--distillation", "self_query=true"]
    (tmp_path / "own.yaml").write_text("smoothing: 0.1\n")
    flags += ["--recipe", str(tmp_path / "own.yaml")]
    trained = CliRunner().invoke(
        train_command,
        [
            *flags,
            "--no-pretrained",
            "--model-ema",
            "--model-ema-decay=0.5",
            "--workers=0",
            "--json",
        ],
        catch_exceptions=False,
    )
    result = json.loads(trained.stdout.splitlines()[-1])
    assert result["epochs"] == 2
    args = TrainConfig.from_yaml(run / "args.yaml")
    assert args.distillation.stage3.softmax_scale == 1
    assert args.distillation.self_query

    exported = CliRunner().invoke(
        export_command,
        [str(run), "--output", str(folder), "--use-ema", "--json"],
        catch_exceptions=False,
    )
    assert json.loads(exported.stdout)["feature_channels"] == [32, 32, 48, 192, 96]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]

    export(run, tmp_path / "hub", export_format="hf")
    card = (tmp_path / "hub/README.md").read_text()
    plan = open_cache(options["cache"]).manifest.plan
    for text in (
        "distilled from test_vit",
        f"| teacher's weights, SHA-256 | {plan.identity.teacher['weights_sha256']} |",
        "| licence of the teacher's weights | not recorded |",
        f"| cache, fingerprint | {plan.cache_id} |",
        f"| training images, fingerprint | {plan.identity.data.fingerprint} |",
        "| licence of the training images | cc0-1.0 |",
        "| recipe | own.yaml |",
        "| views seen in training | ",
        "| 1 | 48 | ",  # the first epoch of the curves
        "    softmax_scale: 1.0",
    ):
        assert text in card, text
    assert str(tmp_path) not in card
    assert (tmp_path / "hub/curves.png").read_bytes().startswith(b"\x89PNG")

    where = ["--data-dir", str(image_folder), "-j", "0", "--json"]
    of_folder, of_run = (
        json.loads(
            CliRunner().invoke(evaluate_command, [*place, *where], catch_exceptions=False).stdout
        )
        for place in ([str(folder)], [str(run), "--use-ema"])
    )
    assert of_folder["num_samples"] == 19
    for name in ("top1", "top5", "loss"):
        assert of_folder[name] == of_run[name]


def test_evaluate_measures_a_subset_of_the_classes(
    options: dict[str, Any], tmp_path: Path, image_folder: Path
) -> None:
    train_student(TrainConfig.from_mapping({**options, "objective": "none", "epochs": 1}))
    subset = tmp_path / "subset"
    shutil.copytree(image_folder / "val/red", subset / "val/red")
    (tmp_path / "map.txt").write_text("2\n")
    config = EvaluateConfig(model=str(tmp_path / "run"), data_dir=str(subset), workers=0)
    mapped = evaluate(config.model_copy(update={"class_map": str(tmp_path / "map.txt")}))
    assert (mapped["top1"], mapped["num_samples"]) == (100, 5)  # of one class, the first is right
    (tmp_path / "short.txt").write_text("2\n1\n")
    config = EvaluateConfig(model=str(tmp_path / "run"), data_dir=str(image_folder), workers=0)
    with pytest.raises(UsageError, match=r"has 2 entries and .* has 3 classes"):
        evaluate(config.model_copy(update={"class_map": str(tmp_path / "short.txt")}))


def test_features_are_evaluated_on_other_classes(
    options: dict[str, Any], tmp_path: Path, image_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other classes are no obstacle to nearest neighbours; answers of the model are left out."""
    train_student(TrainConfig.from_mapping({**options, "objective": "none", "epochs": 1}))
    other = shutil.copytree(image_folder, tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "red").rename(other / split / "crimson")
    config = EvaluateConfig(model=str(tmp_path / "run"), data_dir=str(other), workers=0)
    with pytest.raises(DataError, match="crimson"):
        evaluate(config)
    with pytest.raises(DataError, match="crimson"):  # an agreement has to be of the same classes
        evaluate(
            config.model_copy(update={"knn_split": "train", "teacher_cache": options["cache"]})
        )
    capfd.readouterr()
    scores = evaluate(config.model_copy(update={"knn_split": "train", "knn_k": 3}))
    assert "top1" not in scores
    assert scores["knn_top1"] > 50
    assert "only the features are measured, not the model's own answers" in capfd.readouterr().err
    assert "no answers of its own" in scores.lines()[0]


def test_flags_override_a_recipe_and_unknown_keys_name_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "_about: {top1: 80}\nmodel: resnet50\nweight-decay: 0.02\n"
        "distillation:\n  stage3: {num_heads: 16}\n  kd_alpha: 0.4\n"
    )
    flags = {"output": "run", "weight_decay": 0.1, "distillation": (("stage3.softmax_scale", 2),)}
    config = train_config(str(recipe), flags)
    assert (config.model, config.weight_decay) == ("resnet50", 0.1)
    stage3 = config.distillation.stage3
    assert (stage3.num_heads, stage3.softmax_scale, config.distillation.kd_alpha) == (16, 2, 0.4)

    recipe.write_text("model: resnet50\nwieght_decay: 0.02\n")
    with pytest.raises(UsageError, match=r"mine.yaml: unknown key 'wieght_decay'; did you mean"):
        train_config(str(recipe), {"output": "run"})
    recipe.write_text("distillation: {stage3: {num_head: 2}}\n")
    with pytest.raises(
        UsageError, match=r"'distillation.stage3.num_head'; did you mean 'num_heads'"
    ):
        train_config(str(recipe), {"output": "run", "model": "resnet50"})
    with pytest.raises(UsageError, match="neither a shipped recipe nor a YAML file"):
        train_config("swin-l_resnet", {"output": "run"})


def test_every_option_of_the_configuration_is_a_flag() -> None:
    flags = {parameter.name for parameter in train_command.params}
    assert flags - {"as_json"} == set(TrainConfig.model_fields)
