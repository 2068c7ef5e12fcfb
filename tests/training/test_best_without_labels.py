"""Which epoch is the best where training has no labels: neighbours, feature loss, or the last."""

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.evaluation import EvaluationConfig, EvaluationViews, NeighbourEvaluator, halves
from scalekd.images import open_dataset
from scalekd.pipelines.report import report
from scalekd.pipelines.train_student import train_student
from scalekd.teachers import TeacherConfig
from scalekd.training import TrainConfig
from scalekd.training.interfaces import by_metric, last_epoch
from scalekd.training.random_state import random_state
from tests.training.conftest import headless_teacher


@pytest.fixture(scope="module")
def images(
    image_bytes: Mapping[int, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    write_tar: Callable[..., Path],
) -> Path:
    """40 unlabelled images to train on, 30 labelled ones of ten classes to validate on."""
    folder = tmp_path_factory.mktemp("set")
    names = {n: f"{n:03d}.{'png' if n % 5 == 0 else 'jpg'}" for n in image_bytes}
    write_tar(folder / "train-0.tar", {names[n]: image_bytes[n] for n in range(40)})
    labelled: dict[str, bytes] = {}
    for number in range(40, 70):
        labelled[names[number]] = image_bytes[number]
        labelled[f"{number:03d}.cls"] = b"%d" % (number % 10)
    write_tar(folder / "val-0.tar", labelled)
    write_tar(folder / "bare-0.tar", {names[n]: image_bytes[n] for n in range(40, 70)})
    return folder


@pytest.fixture(scope="module")
def caches(
    images: Path, make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("caches")
    for split in ("train", "val"):
        make_cache(
            root / split,
            teacher=headless_teacher(),
            logits="none",
            data_dir=str(images),
            split=split,
            passes=1,
            **({"aug": "center"} if split == "val" else {}),
        )
    return root


@pytest.fixture
def options(images: Path, caches: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "cache": str(caches / "train"),
        "data_dir": str(images),
        "model": "test_resnet",
        "output": str(tmp_path / "run"),
        "objective": "features",
        "epochs": 3,
        "batch_size": 20,
        "workers": 0,
        "lr": 3e-3,
        "sched": "constant",
    }


def train(options: Mapping[str, Any], **changes: Any) -> Any:
    return train_student(TrainConfig.from_mapping({**options, **changes}))


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "summary.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_neighbours_choose_the_best_epoch_if_validation_images_have_labels(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = train(options, model_ema=True, model_ema_decay=0.5)
    scores = [row["ema_eval_knn_top1"] for row in rows(tmp_path / "run")]
    assert len(scores) == 3
    assert all("eval_knn_top1" in row and "eval_top1" not in row for row in rows(tmp_path / "run"))
    assert result.best_metric == pytest.approx(max(scores), rel=1e-6)
    assert result.best_epoch == scores.index(max(scores))
    best = load_file(tmp_path / "run/model_best/model.safetensors")
    kept = load_file(tmp_path / f"run/checkpoint-{result.best_epoch}/model.safetensors")
    assert all(torch.equal(best[name], kept[name]) for name in best)
    assert "neighbours' top-1" in capfd.readouterr().err
    found = report([tmp_path / "run"], tmp_path / "report.html")
    (row,) = found.rows
    assert row.top1 == pytest.approx(rows(tmp_path / "run")[-1]["eval_knn_top1"], rel=1e-6)
    assert "nearest neighbours" in (tmp_path / "report.html").read_text()
    assert "by neighbours" in "\n".join(found.lines())


def test_a_separate_gallery_gives_the_same_scores_after_resuming(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options |= {"knn_split": "val"}
    whole = train(options)
    assert "--knn-split val: has the images of --val-split" in capfd.readouterr().err
    options |= {"output": str(tmp_path / "halves"), "resume": "auto"}
    for epochs in (1, 3):
        halves_ = train(options, epochs=epochs)
    for run in (whole, halves_):
        assert run.metrics["eval_knn_top1"] > 0
    times = ("seconds", "images_per_second", "data_wait_share")
    first, second = (
        [{k: v for k, v in row.items() if k not in times} for row in rows(tmp_path / name)]
        for name in ("run", "halves")
    )
    assert first == second
    assert (whole.best_epoch, whole.best_metric) == (halves_.best_epoch, halves_.best_metric)


def test_epochs_that_were_validated_otherwise_are_not_compared(
    options: dict[str, Any], caches: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A percentage, a number of an epoch and a negative loss have no order."""
    message = "the epochs so far were validated otherwise"
    options |= {"resume": "auto", "sched": "constant"}
    by_loss = {"val_cache": str(caches / "val"), "val_split": "bare"}
    assert train(options, epochs=1, knn_split="val").best_metric > 2
    unchanged = train(options, epochs=1, **by_loss)  # there is nothing left to train
    assert (unchanged.best_epoch, message in capfd.readouterr().err) == (0, True)
    last = train(options, epochs=2, val_split=None)
    assert (last.best_epoch, message in capfd.readouterr().err) == (1, True)
    first = train(options, epochs=3, **by_loss)
    assert (first.best_epoch, message in capfd.readouterr().err) == (2, True)
    best = load_file(tmp_path / "run/model_best/model.safetensors")
    kept = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert all(torch.equal(best[name], kept[name]) for name in best)
    more = train(options, epochs=4, **by_loss)
    losses = [row["eval_feature_loss"] for row in rows(tmp_path / "run")[2:]]
    assert more.best_epoch == 2 + losses.index(min(losses))
    assert more.best_metric == pytest.approx(-min(losses), rel=1e-6)
    assert message not in capfd.readouterr().err
    neighbours = train(options, epochs=5, knn_split="val")
    assert (neighbours.best_epoch, message in capfd.readouterr().err) == (4, True)
    halves_ = train(options, epochs=6)  # the same metric on other images
    assert (halves_.best_epoch, message in capfd.readouterr().err) == (5, True)


def test_the_feature_loss_chooses_the_best_epoch_if_there_is_only_a_cache(
    options: dict[str, Any], caches: Path, tmp_path: Path
) -> None:
    options |= {"val_cache": str(caches / "val"), "val_split": "bare"}
    # On so few images a contrast is learnt by heart, and rises on others.
    options |= {"distillation": {"summary": "direction"}}
    result = train(options, model_ema=True, model_ema_decay=0.5)
    found = rows(tmp_path / "run")
    losses = [row["ema_eval_feature_loss"] for row in found]
    assert result.best_metric == pytest.approx(-min(losses), rel=1e-6)
    assert result.best_epoch == losses.index(min(losses))
    assert not any("eval_knn_top1" in row for row in found)
    assert found[-1]["eval_feature_loss"] < found[0]["eval_feature_loss"]
    plain = train(options, output=str(tmp_path / "plain"), val_split=None, val_cache=None)
    # Measuring changes nothing.
    assert plain.metrics["train_loss"] == result.metrics["train_loss"]
    page = tmp_path / "report.html"
    assert "feature loss" in "\n".join(report([tmp_path / "run"], page).lines())
    assert "validation feature loss" in page.read_text()


def test_labels_and_a_cache_are_both_logged_and_neighbours_choose(
    options: dict[str, Any], caches: Path, tmp_path: Path
) -> None:
    result = train(options, val_cache=str(caches / "val"))
    assert {"eval_knn_top1", "eval_feature_loss"} <= set(result.metrics)
    scores = [row["eval_knn_top1"] for row in rows(tmp_path / "run")]
    assert result.best_epoch == scores.index(max(scores))


@pytest.mark.parametrize("split", [{"val_split": None}, {"val_split": "bare"}])
def test_the_last_epoch_is_the_best_if_nothing_is_measured(
    options: dict[str, Any], split: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    result = train(options, **split)
    assert (result.best_epoch, result.best_metric) == (2, 2)
    assert "the last epoch counts as the best" in capfd.readouterr().err
    resumed = train(options, **split, epochs=4, resume="auto")
    assert resumed.best_epoch == 3


def test_a_default_validation_split_may_be_missing_and_a_named_one_not(
    options: dict[str, Any], images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(images / "train-0.tar", alone)
    options |= {"data_dir": str(alone), "epochs": 1}
    assert train(options).best_epoch == 0
    assert "no validation split" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"--val-split none"):
        train(options, val_split="val", output=str(tmp_path / "named"))


def test_a_cache_or_gallery_that_does_not_fit_is_refused_before_training(
    options: dict[str, Any],
    images: Path,
    caches: Path,
    make_cache: Callable[..., Any],
    tmp_path: Path,
) -> None:
    other = TeacherConfig(
        model="test_vit2", pretrained=False, img_size=32, model_kwargs={"num_classes": 0}
    )
    make_cache(
        tmp_path / "other",
        teacher=other,
        logits="none",
        data_dir=str(images),
        split="val",
        passes=1,
    )
    with pytest.raises(CacheMismatch, match=r"--val-cache .* test_vit2.* same teacher"):
        train(options, val_cache=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"no image of .* has a label"):
        train(options, knn_split="bare")
    with pytest.raises(UsageError, match="give a labelled --val-split, or leave --knn-split out"):
        train(options, knn_split="val", val_split=None)
    with pytest.raises(UsageError, match="--knn-split: --objective none trains a classifier"):
        train(options, cache=None, split="val", objective="none", knn_split="val")
    with pytest.raises(UsageError, match=r"--val-split is missing: .* no images"):
        train(options, val_cache=str(caches / "val"), val_split=None)
    assert not (tmp_path / "run/last").exists()


def test_halves_have_the_same_share_of_each_class(images: Path) -> None:
    whole = open_dataset(str(images), "val")
    parts = halves(whole)
    keys = [part.key(i) for part in parts for i in range(len(part))]
    assert sorted(keys) == sorted(whole.key(i) for i in range(len(whole)))
    counts = [np.bincount(part.labels, minlength=10) for part in parts]
    assert abs(counts[0] - counts[1]).max() <= 1
    with pytest.raises(DataError, match="--knn-split"):
        halves(whole.taken(np.array([0])))


def test_neighbours_do_not_change_mode_and_random_state(images: Path) -> None:
    views = EvaluationViews(open_dataset(str(images), "val"), Accelerator(cpu=True), 8)
    config = EvaluationConfig(img_size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)

    class Colours(nn.Module):
        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return images

        def forward_head(self, features: torch.Tensor, pre_logits: bool) -> torch.Tensor:
            return features.mean(dim=(2, 3))

    model, before = Colours().train(), json.dumps(str(random_state()))
    metrics = NeighbourEvaluator(views, views, config)(model)
    assert set(metrics) == {"knn_top1", "knn_top5"}
    assert model.training
    assert json.dumps(str(random_state())) == before


def test_a_metric_of_averaged_weights_is_preferred_and_may_be_minimised() -> None:
    choose = by_metric("feature_loss", sign=-1)
    assert choose({"eval_feature_loss": 1.0, "ema_eval_feature_loss": 3.0}) == -3
    assert choose({"eval_feature_loss": 1.0}) == -1
    assert choose({"epoch": 4.0}) is None
    assert last_epoch({"epoch": 4.0}) == 4
