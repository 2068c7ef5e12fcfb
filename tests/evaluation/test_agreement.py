"""A teacher's answers, asked and cached, and how often a model gives the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from timm.data import ImageNetInfo

from scalekd.cache import open_cache
from scalekd.cli.commands import evaluate as evaluate_command
from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.evaluation import (
    EvaluationConfig,
    EvaluationViews,
    Evaluator,
    cached_answers,
    live_answers,
)
from scalekd.images import open_dataset
from scalekd.pipelines.evaluate import EvaluateConfig, evaluate
from scalekd.teachers import Teacher, TeacherConfig, load_teacher


@pytest.fixture
def views(tiny_images: Path) -> EvaluationViews:
    return EvaluationViews(open_dataset(str(tiny_images)), Accelerator(cpu=True), 16)


def a_teacher(**changes: Any) -> Teacher:
    settings = {"img_size": (32, 32), "model_kwargs": {"num_classes": 10}, **changes}
    return load_teacher(TeacherConfig(model="test_vit", pretrained=False, **settings))


@pytest.fixture(scope="session")
def centre_cache(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("centre") / "cache"
    crop_pct = a_teacher().spec.crop_pct
    make_cache(root, aug=f"center:{crop_pct}", passes=1, stages=(), logits="topk:3")
    return root


def test_cached_answers_are_those_the_teacher_gives(
    views: EvaluationViews, centre_cache: Path
) -> None:
    asked = live_answers(a_teacher(), views)
    assert len(np.unique(asked)) > 1
    assert np.array_equal(asked, cached_answers(open_cache(centre_cache), views.images))


def test_a_teacher_agrees_with_itself_and_less_with_another(views: EvaluationViews) -> None:
    teacher = a_teacher()
    answers = live_answers(teacher, views)
    evaluator = Evaluator(views, EvaluationConfig.of(teacher.spec), answers=answers)
    itself = evaluator.evaluate(teacher.model)
    assert itself.teacher_agreement == 100
    assert itself.teacher_top1 == itself.top1
    torch.manual_seed(5)
    other = a_teacher().model
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    found = evaluator.evaluate(other)
    assert found.teacher_agreement < 60  # of ten classes
    assert found.teacher_top1 == itself.teacher_top1


def test_answers_follow_the_class_map(views: EvaluationViews, centre_cache: Path) -> None:
    everything = live_answers(a_teacher(), views)
    (common,) = np.unique(everything)[:1]
    without = [number for number in range(10) if number != common]
    answers = live_answers(a_teacher(), views, class_map=without)
    kept = everything != common
    assert np.array_equal(np.array(without)[answers[kept]], everything[kept])
    with pytest.raises(UsageError, match="has class 10, but the teacher has 10 classes"):
        live_answers(a_teacher(), views, class_map=[10])
    # The cache keeps three classes a view: wherever one of them is left, it must be the answer.
    cached = cached_answers(open_cache(centre_cache), views.images, class_map=without)
    assert np.array_equal(answers, cached)


def test_answers_to_other_images_are_refused(
    views: EvaluationViews, sound_cache: Path, centre_cache: Path
) -> None:
    with pytest.raises(UsageError, match=r"contains random views .* --aug center"):
        cached_answers(open_cache(sound_cache), views.images)
    fewer = views.images.limited(60)
    with pytest.raises(CacheMismatch, match="was made from other images"):
        cached_answers(open_cache(centre_cache), fewer)
    with pytest.raises(UsageError, match="no classification head"):
        live_answers(a_teacher(model_kwargs={"num_classes": 0}), views)


def test_unlabelled_images_are_refused(views: EvaluationViews) -> None:
    labels = views.images.labels.copy()
    labels[3] = -1
    with pytest.raises(DataError, match="sample-003 has no label"):
        replace(views, images=replace(views.images, labels=labels))


def test_the_command_measures_accuracy_and_agreement(tiny_images: Path, centre_cache: Path) -> None:
    where = ["test_vit", "--no-pretrained", "--data-dir", str(tiny_images), "--split=train"]
    common = [*where, "-j0", "--img-size=32", "--knn-split=train", "--knn-k=3"]
    arguments = [*common, "--teacher=test_vit2", "--no-teacher-pretrained", "--json"]
    ran = CliRunner().invoke(evaluate_command, arguments, catch_exceptions=False)
    found = json.loads(ran.stdout)
    assert found["num_samples"] == found["knn_num_gallery"] == 70
    assert 0 <= found["teacher_agreement"] < 100
    assert found["knn_top1"] >= 10  # an image is among its own neighbours
    assert "each is its own example and the scores are too high" in ran.stderr
    arguments = [*common, f"--teacher-cache={centre_cache}"]
    ran = CliRunner().invoke(evaluate_command, arguments, catch_exceptions=False)
    first, second, third = ran.stdout.splitlines()
    assert "70 images" in first
    assert "the teacher's top-1 is" in second
    assert third.startswith("3 nearest of 70 images: top-1")


def test_images_without_labels_are_left_out_with_a_note(
    image_bytes: dict[int, bytes], write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    for split in ("train", "val", "bare"):
        members = {}
        for number in range(20):
            members[f"{split}-{number:03d}.jpg"] = image_bytes[number]
            if number % 4 and split != "bare":
                members[f"{split}-{number:03d}.cls"] = b"%d" % (number % 2)
        write_tar(tmp_path / f"{split}-0.tar", members)
    common = ["test_vit", "--no-pretrained", f"--data-dir={tmp_path}", "-j0", "--img-size=32"]
    common += ["--knn-k=3", "--linear-probe=train", "--json"]
    arguments = [*common, "--knn-split=train", "--split=val"]
    ran = CliRunner().invoke(evaluate_command, arguments, catch_exceptions=False)
    found = json.loads(ran.stdout)
    assert found["num_samples"] == found["knn_num_gallery"] == found["linear_num_images"] == 15
    assert ran.stderr.count("5 of 20 images have no label and are left out, such as") == 2
    assert "its own example" not in ran.stderr
    for arguments in ([*common, "--split=bare"], [*common, "--split=val", "--knn-split=bare"]):
        with pytest.raises(DataError, match=r"none of its 20 images has a label.*--target-key"):
            CliRunner().invoke(evaluate_command, arguments, catch_exceptions=False)


def test_a_subset_is_evaluated_by_the_names_of_its_classes(
    tiny_images: Path, tmp_path: Path
) -> None:
    # The same shards; their classes are those of the subset, by number and by name.
    (tmp_path / "named").mkdir()
    for shard in tiny_images.glob("*.tar"):
        (tmp_path / "named" / shard.name).symlink_to(shard)
    synsets = ImageNetInfo().label_names()
    names = [synsets[number] for number in (999, *range(9))]
    (tmp_path / "named/classes.txt").write_text("\n".join(names))
    settings = EvaluateConfig(
        model="test_vit",
        data_dir=str(tmp_path / "named"),
        split="train",
        pretrained=False,
        workers=0,
        img_size=32,
    )
    by_name = evaluate(settings)
    assert by_name["num_classes_evaluated"] == 10
    (tmp_path / "map.txt").write_text("\n".join(map(str, (999, *range(9)))))
    assert evaluate(settings.model_copy(update={"class_map": str(tmp_path / "map.txt")})) == by_name
    by_number = evaluate(settings.model_copy(update={"class_map": "none"}))
    assert by_number["num_classes_evaluated"] is None
    assert by_number["loss"] > by_name["loss"] + 1  # 1000 classes are in the running, not ten


def test_options_that_contradict_one_another_are_refused(tiny_images: Path) -> None:
    settings = EvaluateConfig(
        model="test_vit", data_dir=str(tiny_images), split="train", pretrained=False, workers=0
    )
    with pytest.raises(UsageError, match="one or the other"):
        evaluate(settings.model_copy(update={"teacher": "test_vit", "teacher_cache": "cache"}))
    with pytest.raises(UsageError, match="needs --teacher"):
        evaluate(settings.model_copy(update={"teacher_checkpoint": "weights.pt"}))
