"""Training without labels, from a teacher without a classifier, and with labels of some images."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalekd.distillation import ScaleKDConfig
from scalekd.errors import DataError, UsageError
from scalekd.options import ImageOptions
from scalekd.pipelines.train_student import train_student
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig, has_class_token, load_teacher
from scalekd.training import CachedTeacher, TrainConfig, load_trained_student

NONE = ImageOptions(labels="none")
HEADLESS = TeacherConfig(
    model="test_vit", pretrained=False, img_size=32, model_kwargs={"num_classes": 0}
)
FEATURE_TERMS = {
    *(f"stage{stage}_{view}_loss" for stage in (3, 4) for view in ("spatial", "frequency")),
    "summary_loss",
}


@pytest.fixture
def options(unlabelled_cache: Path, flat_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "cache": str(unlabelled_cache),
        "data_dir": str(flat_folder),
        "labels": "none",
        "model": "test_resnet",
        "output": str(tmp_path / "run"),
        "objective": "features",
        "val_split": None,
        "epochs": 2,
        "batch_size": 16,
        "workers": 0,
        "lr": 3e-3,
    }


def train(options: Mapping[str, Any], **changes: Any) -> Any:
    return train_student(TrainConfig.from_mapping({**options, **changes}))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_student_learns_features_without_labels_logits_and_classifier(
    options: dict[str, Any], tmp_path: Path
) -> None:
    result = train(options, epochs=4)
    losses = [float(row["train_loss"]) for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0]
    named = {name.removeprefix("train_") for name in result.metrics if name.startswith("train_")}
    assert named == {*FEATURE_TERMS, "loss", "grad_norm"}
    student = load_trained_student(tmp_path / "run")
    assert student.spec.num_classes == 0
    assert student.class_names is None
    assert student.model(torch.zeros(1, 3, 32, 32)).shape[1] == student.model.num_features
    assert "summary.weight" in " ".join(load_file(tmp_path / "run/last/objective.safetensors"))


@pytest.mark.parametrize(
    "model", ["test_vit", "test_convnext", "test_mambaout", "test_efficientnet"]
)
@pytest.mark.parametrize("summary", [0, 1])
def test_every_trained_parameter_has_a_gradient(
    unlabelled_cache: Path, flat_folder: Path, model: str, summary: float
) -> None:
    teacher = CachedTeacher(unlabelled_cache, data_dir=flat_folder, image_options=NONE)
    student = create_student(model, num_classes=3 if summary else 0, img_size=32)
    config = ScaleKDConfig(summary_weight=summary)
    module = teacher.module(student, objective="features", config=config)
    targets = teacher.targets(module.objective)
    batch = next(iter(teacher.loader(student, targets, batch_size=8)))
    losses, metrics = module(batch["pixels"], batch["label"], targets(batch))
    losses["total"].backward()
    assert not metrics
    without = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert sum(p.requires_grad for p in student.parameters()) > 5


def test_a_run_resumes_to_the_same_weights(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"sched": "constant"}
    train(options)
    halves = {**options, "output": str(tmp_path / "halves"), "resume": "auto"}
    for epochs in (1, 2):
        train(halves, epochs=epochs)
    for name in ("model.safetensors", "objective.safetensors"):
        whole, again = (load_file(tmp_path / run / "last" / name) for run in ("run", "halves"))
        assert all(torch.equal(whole[tensor], again[tensor]) for tensor in whole)


def test_images_without_a_label_are_left_out_of_the_task_loss_with_a_note(
    make_cache: Callable[..., Any],
    options: dict[str, Any],
    image_bytes: Mapping[int, bytes],
    write_tar: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    members: dict[str, bytes] = {}
    for number, image in image_bytes.items():
        members[f"{number:03d}.{'png' if number % 5 == 0 else 'jpg'}"] = image
        if number % 7 == 0:
            members[f"{number:03d}.cls"] = b"%d" % (number % 10)
    write_tar(tmp_path / "data/train-0.tar", members)
    make_cache(tmp_path / "cache", data_dir=str(tmp_path / "data"), passes=1)
    capfd.readouterr()
    partly = {
        **options,
        "cache": str(tmp_path / "cache"),
        "data_dir": str(tmp_path / "data"),
        "labels": "auto",
        "batch_size": 4,  # some batches have no label
        "epochs": 1,
        "log_interval": 1,
    }
    result = train(partly, objective="scalekd-light")
    assert "60 of the 70 samples have no label, such as '001'; they are left out of the task" in (
        capfd.readouterr().err
    )
    assert 0 <= result.metrics["train_top1"] <= 100
    assert result.metrics["train_task_loss"] > 0
    steps = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    without = [step for step in steps if "top1" not in step]
    assert without
    assert all(step["task_loss"] == 0 for step in without)
    assert any(step.get("task_loss") for step in steps)
    for objective in ("none", "kd"):
        train(partly, objective=objective, output=str(tmp_path / objective))
    train(partly, objective="features", output=str(tmp_path / "features"))
    assert "have no label, such as '001'; they are left out" in capfd.readouterr().err


def test_the_teachers_answers_alone_need_no_labels(
    make_cache: Callable[..., Any], options: dict[str, Any], flat_folder: Path, tmp_path: Path
) -> None:
    make_cache(tmp_path / "cache", data_dir=str(flat_folder), labels="none", passes=1)
    options |= {"cache": str(tmp_path / "cache"), "objective": "kd", "epochs": 1}
    result = train(options, distillation={"kd_alpha": 1})
    assert "train_kd_loss" in result.metrics
    assert "train_teacher_agreement" in result.metrics
    assert not {"train_task_loss", "train_top1"} & set(result.metrics)
    assert load_trained_student(tmp_path / "run").spec.num_classes == 10  # the teacher's
    with pytest.raises(DataError, match="or --objective kd --distillation kd_alpha=1"):
        train(options, output=str(tmp_path / "other"))


def test_settings_of_a_classifier_that_have_no_effect_are_named(
    options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    distillation = {"spatial": False, "frequency": False}
    train(options, epochs=1, distillation=distillation)
    assert "no effect" not in capfd.readouterr().err
    changed = {"distillation": {**distillation, "kd_alpha": 0.5}, "smoothing": 0.1}
    train(options, epochs=1, overwrite=True, **changed)
    assert "these settings have no effect: smoothing, kd_alpha" in capfd.readouterr().err


@pytest.mark.parametrize("objective", ["none", "scalekd", "scalekd-light"])
def test_what_needs_labels_says_what_does_not(options: dict[str, Any], objective: str) -> None:
    options |= {"objective": objective, "distillation": {"kd": False}, "num_classes": 10}
    with pytest.raises(DataError, match=r"none of the cache's 70 .* needs; give --obj.* features"):
        train(options)


def test_what_the_teacher_or_the_cache_lacks_is_said_at_once(
    make_cache: Callable[..., Any], options: dict[str, Any], tiny_images: Path, tmp_path: Path
) -> None:
    labelled = {**options, "data_dir": str(tiny_images), "labels": "auto"}
    make_cache(tmp_path / "headless", teacher=HEADLESS, logits="none", passes=1)
    with pytest.raises(UsageError, match=r"no logits.* or without labels and .* features"):
        train(labelled, cache=str(tmp_path / "headless"), objective="scalekd")
    make_cache(tmp_path / "logits", stages=(), passes=1)
    with pytest.raises(UsageError, match=r"no final-stage .* final or 3,4, or train with .* kd"):
        train(labelled, cache=str(tmp_path / "logits"))
    for objective in ("scalekd", "none"):
        with pytest.raises(UsageError, match=rf"--num-classes 0: .* {objective} trains a class"):
            train(labelled, cache=str(tmp_path / "headless"), objective=objective, num_classes=0)
    headless = create_student("test_resnet", num_classes=0, img_size=32)
    teacher = CachedTeacher(tmp_path / "headless", data_dir=tiny_images)
    with pytest.raises(UsageError, match=r"none trains a classifier.* leave out --num-classes"):
        teacher.module(headless, objective="none")


def test_the_class_token_is_the_summary_where_the_teacher_has_one(
    unlabelled_cache: Path, flat_folder: Path
) -> None:
    teacher = CachedTeacher(unlabelled_cache, data_dir=flat_folder, image_options=NONE)
    student = create_student("test_resnet", num_classes=0, img_size=32)
    module = teacher.module(student, objective="features")
    targets = teacher.targets(module.objective)
    batch = next(iter(teacher.loader(student, targets, batch_size=4)))
    live = load_teacher(HEADLESS)
    said = live(batch["pixels"]).features[4]
    found = targets(batch)
    assert teacher.spec.stages[4].num_prefix_tokens == 1
    torch.testing.assert_close(found.class_token, said[:, 0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.features, said[:, 1:], rtol=2e-3, atol=2e-3)
    plain = teacher.module(student, objective="features", config=ScaleKDConfig(summary_weight=0))
    assert teacher.targets(plain.objective)(batch).class_token is None


@pytest.mark.parametrize(
    ("model", "arguments", "num_prefix_tokens", "expected"),
    [
        ("vit_small_patch14_dinov2", {}, 1, True),
        ("vit_small_patch14_reg4_dinov2", {}, 5, True),
        ("vit_medium_patch16_reg4_gap_256", {}, 4, False),
        ("deit_small_distilled_patch16_224", {}, 2, True),
        ("vit_small_patch16_dinov3", {}, 5, True),
        ("beit_base_patch16_224", {}, 1, True),
        ("vit_base_patch16_siglip_224", {}, 0, False),
    ],
)
def test_registers_are_no_class_token(
    model: str, arguments: dict[str, Any], num_prefix_tokens: int, expected: bool
) -> None:
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0, **arguments}
    teacher = load_teacher(
        TeacherConfig(model=model, pretrained=False, img_size=64, model_kwargs=small)
        if "dinov2" not in model
        else TeacherConfig(model=model, pretrained=False, img_size=56, model_kwargs=small)
    )
    assert teacher.spec.stages[4].num_prefix_tokens == num_prefix_tokens
    assert has_class_token(teacher.spec) == expected


def test_frequency_losses_of_maps_of_one_place_are_named(
    options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    result = train(options, model="test_resnet", epochs=1)
    assert result.metrics["train_stage4_frequency_loss"] == pytest.approx(3)
    err = " ".join(capfd.readouterr().err.split())
    assert "stage4_frequency_loss: cannot be lowered" in err
    assert "stage3_frequency_loss" not in err
    off = {"stage4": {"frequency_weight": 0}}
    train(options, model="test_resnet", epochs=1, overwrite=True, distillation=off)
    assert "cannot be lowered" not in capfd.readouterr().err
