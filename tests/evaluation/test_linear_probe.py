"""The linear probe against scikit-learn used directly, and what it refuses."""

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
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from scalekd.cli.commands import evaluate as evaluate_command
from scalekd.errors import UsageError
from scalekd.evaluation import EvaluationConfig, EvaluationViews, evaluate_linear_probe
from scalekd.evaluation.linear_probe import STRENGTHS, _held_out
from scalekd.images import ImageDataset, open_dataset
from scalekd.pipelines.evaluate import EvaluateConfig, evaluate

CONFIG = EvaluationConfig(img_size=(16, 16), mean=(0.4,) * 3, std=(0.2,) * 3)
COLUMNS = ("keys", "labels", "file_numbers", "offsets", "sizes")


class Colours(nn.Module):
    """Means of the quarters of an image, and a feature that never varies."""

    def forward_features(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        assert pre_logits
        return torch.cat([features.flatten(1), torch.full((len(features), 1), 7.0)], dim=1)


@pytest.fixture
def views(tiny_images: Path) -> Callable[..., EvaluationViews]:
    images = open_dataset(str(tiny_images))

    def make(part: slice, *, batch_size: int = 7, labels: Any = None) -> EvaluationViews:
        chosen: ImageDataset = replace(images, **{n: getattr(images, n)[part] for n in COLUMNS})
        if labels is not None:
            chosen = replace(chosen, labels=np.asarray(labels, np.int32))
        return EvaluationViews(chosen, Accelerator(cpu=True), batch_size)

    return make


def features_of(views: EvaluationViews) -> tuple[np.ndarray, np.ndarray]:
    batches = list(views.batches(CONFIG))
    features = [Colours().forward_head(Colours().forward_features(b.images), True) for b in batches]
    return torch.cat(features).numpy(), torch.cat([b.labels for b in batches]).numpy()


def test_the_probe_is_logistic_regression_of_standardised_features(
    views: Callable[..., EvaluationViews],
) -> None:
    training, asked = views(slice(0, 50)), views(slice(50, 70))
    result = evaluate_linear_probe(Colours(), asked, training, CONFIG)
    (known, classes), (unknown, truth) = features_of(training), features_of(asked)
    (strength,) = result.linear_strengths
    assert strength in STRENGTHS
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    expected = 100 * pipeline.fit(known, classes).score(unknown, truth)
    assert result.linear_top1 == pytest.approx(expected)
    assert result.linear_top5 >= result.linear_top1
    assert result.linear_num_images == 50
    again = evaluate_linear_probe(Colours(), views(slice(50, 70), batch_size=3), training, CONFIG)
    assert again == result


def test_separable_classes_are_classified_with_the_numbers_of_the_training_split(
    views: Callable[..., EvaluationViews],
) -> None:
    features, _ = features_of(views(slice(0, 70)))
    bright = features[:, 0] > np.median(features[:, 0])
    training = views(slice(0, 70), labels=bright)
    assert evaluate_linear_probe(Colours(), training, training, CONFIG).linear_top1 > 85
    swapped = views(slice(0, 70), labels=~bright)
    result = evaluate_linear_probe(Colours(), swapped, training, CONFIG, class_map=(1, 0))
    assert result.linear_top1 > 85
    assert evaluate_linear_probe(Colours(), swapped, training, CONFIG).linear_top1 < 15


def test_every_seed_holds_out_a_fifth_of_each_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [20, 10, 2, 1])
    one, other = _held_out(labels, 0, "x"), _held_out(labels, 1, "x")
    assert np.bincount(labels[one], minlength=4).tolist() == [4, 2, 1, 0]
    assert np.bincount(labels[other], minlength=4).tolist() == [4, 2, 1, 0]
    assert (one != other).any()
    assert (one == _held_out(labels, 0, "x")).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0] * 10, "has one class"), (range(10), "no class of .* has two images")],
)
def test_splits_that_cannot_be_probed_are_refused(
    views: Callable[..., EvaluationViews], labels: Any, message: str
) -> None:
    training = views(slice(0, 10), labels=list(labels))
    with pytest.raises(UsageError, match=message):
        evaluate_linear_probe(nn.Identity(), training, training, CONFIG)


def test_a_model_without_classes_is_evaluated_by_its_features(tiny_images: Path) -> None:
    where = ["vit_small_patch14_dinov2", "--no-pretrained", f"--data-dir={tiny_images}", "-j0"]
    where += ["--split=train", "--img-size=28"]
    features = ["--knn-split=train", "--knn-k=3", "--linear-probe=train", "--linear-probe-seeds=2"]
    ran = CliRunner().invoke(
        evaluate_command, [*where, *features, "--json"], catch_exceptions=False
    )
    found = json.loads(ran.stdout)
    assert "top1" not in found
    assert len(found["linear_top1_of_seeds"]) == 2
    assert found["linear_top1"] > 30  # on its own training images; ten classes
    assert found["num_samples"] == found["linear_num_images"] == 70
    settings = EvaluateConfig(
        model="vit_small_patch14_dinov2", data_dir=str(tiny_images), pretrained=False
    )
    with pytest.raises(UsageError, match="evaluate its features with --knn-split or --linear-pro"):
        evaluate(settings)
    with pytest.raises(UsageError, match=r"--teacher: .* has no classes that could agree"):
        evaluate(settings.model_copy(update={"knn_split": "train", "teacher": "test_vit"}))


def test_the_command_prints_neighbours_and_probe(tiny_images: Path) -> None:
    where = ["test_vit", "--no-pretrained", f"--data-dir={tiny_images}", "-j0", "--split=train"]
    where += ["--img-size=32", "--class-map=none", "--linear-probe=train", "--linear-probe-seeds=2"]
    ran = CliRunner().invoke(evaluate_command, where, catch_exceptions=False)
    first, second = ran.stdout.splitlines()
    assert "top-5" in first
    assert second.startswith("logistic regression on the features of 70 images: top-1")
    assert "(2 seeds)" in second
