"""Segmentation with a student's levels: a small decoder, with the backbone frozen or fine-tuned."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.transfer.scenes import Scenes
from scalekd.training.precision import choose_precision

_WIDTH = 64  # channels of the decoder
_BATCH = 16


class Segmenter(nn.Module):
    """A backbone and a decoder: every level projected to one width, enlarged, and summed.

    Args:
        backbone: Returns a list of maps, finest first, and has ``feature_info``.
        num_classes: Number of classes with the background.
        frozen: Keep the backbone as it is, in eval mode.
    """

    def __init__(self, backbone: Any, num_classes: int, *, frozen: bool) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone, frozen
        channels = backbone.feature_info.channels()
        # Levels have different scales; of a frozen backbone nothing else could level them.
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in channels)
        self.projections = nn.ModuleList(nn.Conv2d(width, _WIDTH, 1) for width in channels)
        self.middle = nn.Sequential(
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(),
        )
        self.classify = nn.Conv2d(_WIDTH, num_classes, 1)
        for parameter in backbone.parameters():
            parameter.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return scores ``(scene, class, row, column)`` of normalised images of the same size."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            levels = self.backbone(images)
        size = levels[0].shape[-2:]
        parts = zip(levels, self.norms, self.projections, strict=True)
        enlarged = [
            F.interpolate(project(norm(level)), size, mode="bilinear")
            for level, norm, project in parts
        ]
        scores = self.classify(self.middle(torch.stack(enlarged).sum(dim=0)))
        return F.interpolate(scores, images.shape[-2:], mode="bilinear")


def segment(
    model: Segmenter, training: Scenes, test: Scenes, *, epochs: int, rate: float, seed: int
) -> dict[str, float]:
    """Train a segmenter, and return its scores on other scenes, in percent.

    Returns:
        ``miou``: mean over the classes, with the background, of intersection over union;
        ``object_miou``: without the background.
    """
    torch.manual_seed(seed)
    model.to(memory_format=torch.channels_last)  # a third faster on a CPU
    images, masks = _tensors(training)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05)
    updates = epochs * (len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: _factor(n, updates))
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(_BATCH):
            if len(rows) < _BATCH:
                continue
            flipped = (torch.rand(_BATCH) < 0.5)[:, None, None]
            batch, truth = images[rows], masks[rows]
            batch = torch.where(flipped[:, None], batch.flip(-1), batch)
            truth = torch.where(flipped, truth.flip(-1), truth)
            with _autocast():
                scores = model(batch)
            loss = F.cross_entropy(scores.float(), truth)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return _scores(model, test)


def _autocast() -> torch.autocast:
    """Compute in bf16 where the processor multiplies bf16, like pre-training."""
    return torch.autocast("cpu", torch.bfloat16, enabled=choose_precision("auto") == "bf16")


def _factor(update: int, updates: int) -> float:
    """Return the factor of the rate: a warm-up over a tenth of the updates, and a cosine to 0."""
    warm_up = min(1.0, 10 * (update + 1) / updates)
    return warm_up * (1 + math.cos(math.pi * update / updates)) / 2


@torch.inference_mode()
def _scores(model: Segmenter, test: Scenes) -> dict[str, float]:
    model.eval()
    images, masks = _tensors(test)
    with _autocast():
        answers = torch.cat([model(batch).argmax(dim=1) for batch in images.split(_BATCH)])
    ious = intersection_over_union(answers, masks, model.classify.out_channels)
    return {"miou": 100 * float(np.mean(ious)), "object_miou": 100 * float(np.mean(ious[1:]))}


def intersection_over_union(answers: Tensor, masks: Tensor, num_classes: int) -> list[float]:
    """Return the ratio of every class over all pixels of all scenes; 0 for a class nowhere."""
    pairs = torch.bincount((masks * num_classes + answers).flatten(), minlength=num_classes**2)
    table = pairs.reshape(num_classes, num_classes).double()
    hits = table.diagonal()
    union = table.sum(dim=0) + table.sum(dim=1) - hits
    ratios: list[float] = (hits / union.clamp(min=1)).tolist()
    return ratios


def _tensors(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Return images normalised with ImageNet's mean and deviation, and masks as classes."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = torch.from_numpy(scenes.images).float().div(255)
    images = ((pixels - mean) / std).permute(0, 3, 1, 2)  # channels last, as they are
    return images, torch.from_numpy(scenes.masks).long()
