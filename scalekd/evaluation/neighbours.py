"""Nearest-neighbour classification on a student's features, without a classifier.

The protocol is that of DINO (Caron et al. 2021, section 4.1, after Wu et al. 2018): cosine
similarity of pooled features, the ``k`` nearest images of the training split vote for their class
with weight ``exp(similarity / temperature)``.

All queries stay in memory, and the gallery is read in batches; after each batch only the ``k`` best
neighbours are kept. Memory is therefore ``queries * (channels + 3 * k)`` numbers per process,
independent of the size of the gallery. Each process reads its share of the gallery.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from scalekd.distributed import Coordinator
from scalekd.errors import UsageError
from scalekd.evaluation.views import EvaluationBatch, EvaluationConfig, EvaluationViews

_QUERIES_AT_ONCE = 4096  # queries compared with a batch of the gallery at a time


@dataclass(frozen=True)
class NeighbourResult:
    """Accuracy of nearest-neighbour classification.

    Attributes:
        knn_top1: Percent of queries whose class has the most votes.
        knn_top5: Percent of queries whose class is among the five with the most votes.
        knn_k: Number of neighbours that vote.
        knn_num_gallery: Number of images in the gallery.
    """

    knn_top1: float
    knn_top5: float
    knn_k: int
    knn_num_gallery: int


@dataclass(frozen=True)
class Neighbours:
    """The best gallery images of each query so far, best first.

    Of equal similarities the image with the lower index in the gallery is first, so that the result
    does not depend on batches or processes.
    """

    similarities: Float[Tensor, "query k"]
    positions: Int64[Tensor, "query k"]

    @classmethod
    def none(cls, num_queries: int, device: torch.device | str = "cpu") -> "Neighbours":
        empty = torch.empty(num_queries, 0, device=device)
        return cls(empty, empty.long())

    def joined(self, other: "Neighbours", k: int) -> "Neighbours":
        """Return the best ``k`` neighbours of both."""
        similarities = torch.cat([self.similarities, other.similarities], dim=1)
        positions = torch.cat([self.positions, other.positions], dim=1)
        order = positions.argsort(dim=1)
        similarities, positions = similarities.gather(1, order), positions.gather(1, order)
        best = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
        return Neighbours(similarities.gather(1, best), positions.gather(1, best))


def evaluate_neighbours(
    model: nn.Module,
    queries: EvaluationViews,
    gallery: EvaluationViews,
    config: EvaluationConfig,
    *,
    k: int = 20,
    temperature: float = 0.07,
    class_map: Sequence[int] | None = None,
) -> NeighbourResult:
    """Classify each query by its nearest images of the gallery; all processes must call this.

    Args:
        model: A bare timm model, in eval mode, on the device.
        queries: Views of the split that is evaluated.
        gallery: Views of the split of the neighbours.
        config: Size and preprocessing of the model's input.
        k: Number of neighbours that vote.
        temperature: Divides the similarities in the weights of the votes.
        class_map: The gallery's class of each label of the queries, if they are numbered
            differently. All classes of the gallery can be predicted.

    Raises:
        UsageError: The gallery has fewer than ``k`` images.
        DataError: An image is corrupt.
    """
    if len(gallery.images) < k:
        raise UsageError(f"--knn-k {k}: {gallery.images.location} has {len(gallery.images)} images")
    coordinator = Coordinator(queries.accelerator.num_processes)
    features = F.normalize(pooled_features(model, queries, config, coordinator), dim=1)
    nearest = coordinator.together(lambda: _nearest(model, features, gallery, config, k))
    best = Neighbours.none(len(features))
    for neighbours in coordinator.collect(nearest):
        best = best.joined(neighbours, k)

    labels = torch.from_numpy(queries.images.labels.astype(np.int64))
    if class_map is not None:
        labels = torch.tensor(list(class_map))[labels]
    first, fifth = _vote(best, gallery, labels, temperature)
    return NeighbourResult(first, fifth, k, len(gallery.images))


def pooled_features(
    model: nn.Module, views: EvaluationViews, config: EvaluationConfig, coordinator: Coordinator
) -> Float[Tensor, "image channel"]:
    """Return a model's pooled features of every image in order, on the CPU; collective.

    Raises:
        DataError: An image is corrupt.
    """
    shares = coordinator.collect(coordinator.together(lambda: _features(model, views, config)))
    order = torch.cat([positions for positions, _ in shares]).argsort()
    return torch.cat([part for _, part in shares if len(part)])[order]


@torch.inference_mode()
def _features(
    model: nn.Module, views: EvaluationViews, config: EvaluationConfig
) -> tuple[Tensor, Tensor]:
    """Return positions and features of this process's share, on the CPU."""
    positions: list[int] = []
    parts: list[Tensor] = []
    for batch in views.batches(config):
        positions += batch.positions
        parts.append(_pooled(model, batch, views).cpu())
    if not parts:  # more processes than images
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    return torch.tensor(positions), torch.cat(parts)


def _pooled(
    model: Any, batch: EvaluationBatch, views: EvaluationViews
) -> Float[Tensor, "batch channel"]:
    with views.accelerator.autocast():
        features = model.forward_head(model.forward_features(batch.images), pre_logits=True)
    pooled: Tensor = features.float().flatten(1)
    return pooled


@torch.inference_mode()
def _nearest(
    model: nn.Module,
    features: Tensor,
    gallery: EvaluationViews,
    config: EvaluationConfig,
    k: int,
) -> Neighbours:
    """Return the nearest images in this process's share of the gallery."""
    device = gallery.accelerator.device
    parts = torch.split(features.to(device), _QUERIES_AT_ONCE)
    best = [Neighbours.none(len(part), device) for part in parts]
    for batch in gallery.batches(config):
        images = F.normalize(_pooled(model, batch, gallery), dim=1)
        positions = torch.tensor(batch.positions, device=device)
        for number, part in enumerate(parts):
            candidates = Neighbours(part @ images.T, positions.expand(len(part), -1))
            best[number] = best[number].joined(candidates, k)
    return Neighbours(
        torch.cat([part.similarities for part in best]).cpu(),
        torch.cat([part.positions for part in best]).cpu(),
    )


def _vote(
    best: Neighbours, gallery: EvaluationViews, labels: Tensor, temperature: float
) -> tuple[float, float]:
    """Return the percent of queries whose class is first, and among the first five."""
    classes = torch.from_numpy(gallery.images.labels.astype(np.int64))[best.positions]
    num_classes = max(gallery.num_classes, int(labels.max()) + 1)
    hits = torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(labels), _QUERIES_AT_ONCE):
        part = slice(first, first + _QUERIES_AT_ONCE)
        votes = torch.zeros(len(labels[part]), num_classes)
        votes.scatter_add_(1, classes[part], (best.similarities[part] / temperature).exp())
        ranked = votes.topk(min(5, num_classes))
        # A class without votes does not count as an answer.
        right = (ranked.indices == labels[part, None]) & (ranked.values > 0)
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (100 * hits / len(labels)).tolist()
    return top1, top5
