"""Neighbours against the protocol's formula, worked out with NumPy on all similarities at once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scalekd.errors import UsageError
from scalekd.evaluation import EvaluationConfig, EvaluationViews, evaluate_neighbours, neighbours
from scalekd.evaluation.neighbours import Neighbours
from scalekd.images import ImageDataset, open_dataset

CONFIG = EvaluationConfig(img_size=(16, 16), mean=(0.4,) * 3, std=(0.2,) * 3)


class Colours(nn.Module):
    """Means of the quarters of an image, as a timm model would give them."""

    def forward_features(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        assert pre_logits
        return features.flatten(1)


@pytest.fixture
def split(tiny_images: Path) -> Callable[..., EvaluationViews]:
    images = open_dataset(str(tiny_images))

    def make(part: slice, *, batch_size: int = 7) -> EvaluationViews:
        columns = ("keys", "labels", "file_numbers", "offsets", "sizes")
        chosen: ImageDataset = replace(
            images, **{name: getattr(images, name)[part] for name in columns}
        )
        return EvaluationViews(chosen, Accelerator(cpu=True), batch_size)

    return make


def by_formula(
    queries: EvaluationViews, gallery: EvaluationViews, k: int, temperature: float
) -> tuple[float, float]:
    def read(views: EvaluationViews) -> tuple[np.ndarray, np.ndarray]:
        batches = list(views.batches(CONFIG))
        features = torch.cat([Colours().forward_features(b.images).flatten(1) for b in batches])
        features = features.double().numpy()
        labels = torch.cat([batch.labels for batch in batches]).numpy()
        return features / np.linalg.norm(features, axis=1, keepdims=True), labels

    (asked, truth), (known, classes) = read(queries), read(gallery)
    first = fifth = 0
    for feature, label in zip(asked, truth, strict=True):
        similarity = known @ feature
        nearest = np.argsort(-similarity)[:k]
        votes = np.zeros(10)
        np.add.at(votes, classes[nearest], np.exp(similarity[nearest] / temperature))
        ranked = [c for c in np.argsort(-votes)[:5] if votes[c] > 0]
        first += ranked[0] == label
        fifth += label in ranked
    return 100 * first / len(truth), 100 * fifth / len(truth)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 0.01)])
def test_the_vote_is_that_of_the_formula(
    split: Callable[..., EvaluationViews], k: int, temperature: float
) -> None:
    queries, gallery = split(slice(0, 30)), split(slice(30, None))
    found = evaluate_neighbours(Colours(), queries, gallery, CONFIG, k=k, temperature=temperature)
    expected = by_formula(queries, gallery, k, temperature)
    assert (found.knn_top1, found.knn_top5) == pytest.approx(expected)
    assert 0 < found.knn_top1 < 100
    assert (found.knn_k, found.knn_num_gallery) == (k, 40)


def test_batches_and_parts_of_queries_change_nothing(
    split: Callable[..., EvaluationViews], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_neighbours(
        Colours(), split(slice(0, 30)), split(slice(30, None), batch_size=64), CONFIG, k=5
    )
    monkeypatch.setattr(neighbours, "_QUERIES_AT_ONCE", 4)
    parts = evaluate_neighbours(
        Colours(), split(slice(0, 30)), split(slice(30, None), batch_size=1), CONFIG, k=5
    )
    assert parts == whole


def test_an_image_is_its_own_nearest_neighbour(split: Callable[..., EvaluationViews]) -> None:
    same = split(slice(None))
    found = evaluate_neighbours(Colours(), same, same, CONFIG, k=1)
    assert found.knn_top1 == found.knn_top5 == 100


def test_queries_numbered_differently_are_matched(split: Callable[..., EvaluationViews]) -> None:
    same = split(slice(None))
    turned = replace(same, images=replace(same.images, labels=(same.images.labels + 1) % 10))
    assert evaluate_neighbours(Colours(), turned, same, CONFIG, k=1).knn_top1 == 0
    back = [(number - 1) % 10 for number in range(10)]
    found = evaluate_neighbours(Colours(), turned, same, CONFIG, k=1, class_map=back)
    assert found.knn_top1 == 100


def test_only_the_nearest_vote_and_ties_go_to_the_first_class() -> None:
    best = Neighbours(torch.tensor([[0.9, 0.5]]), torch.tensor([[8, 6]]))
    other = Neighbours(torch.tensor([[0.5, 0.5, 0.7]]), torch.tensor([[9, 2, 4]]))
    for joined in (best.joined(other, 3), other.joined(best, 3)):
        assert joined.positions.tolist() == [[8, 4, 2]]
        assert joined.similarities.tolist() == [[pytest.approx(v) for v in (0.9, 0.7, 0.5)]]


def test_a_gallery_smaller_than_k_is_refused(split: Callable[..., EvaluationViews]) -> None:
    with pytest.raises(UsageError, match=r"--knn-k 20: .* has 5 images"):
        evaluate_neighbours(Colours(), split(slice(0, 9)), split(slice(0, 5)), CONFIG, k=20)
