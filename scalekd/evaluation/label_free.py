"""Validation of a student that has no classifier: nearest neighbours, or the feature loss.

Both are called like `Evaluator`: with a bare timm model, by every process.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from scalekd.distributed import Coordinator
from scalekd.errors import DataError
from scalekd.evaluation.neighbours import evaluate_neighbours
from scalekd.evaluation.views import EvaluationConfig, EvaluationViews
from scalekd.images import ImageDataset
from scalekd.training.interfaces import EpochLoader
from scalekd.training.module import DistillationModule

NUM_NEIGHBOURS = 20


class NeighbourEvaluator:
    """Top-1 of the nearest neighbours, by name ``knn_top1``; see `evaluate_neighbours`.

    Args:
        queries: Views that are classified.
        gallery: Views of the neighbours.
        config: Size and preprocessing of the models' input.
        class_map: The gallery's class of each label of the queries, if they are numbered
            differently.
    """

    def __init__(
        self,
        queries: EvaluationViews,
        gallery: EvaluationViews,
        config: EvaluationConfig,
        *,
        class_map: Sequence[int] | None = None,
    ) -> None:
        self._queries, self._gallery, self._config = queries, gallery, config
        self._class_map = class_map
        self._k = min(NUM_NEIGHBOURS, len(gallery.images))

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        """Return ``knn_top1`` and ``knn_top5`` in percent; the model's mode is restored."""
        was_training = model.training
        model.eval()
        try:
            result = evaluate_neighbours(
                model,
                self._queries,
                self._gallery,
                self._config,
                k=self._k,
                class_map=self._class_map,
            )
        finally:
            model.train(was_training)
        return {"knn_top1": result.knn_top1, "knn_top5": result.knn_top5}


class FeatureLossEvaluator:
    """Mean feature loss on the views of a cache, by name ``feature_loss``.

    Every process takes its share, in whole batches, of the first pass. Projectors are in eval mode;
    with an average of the student's weights, they are still those of the student itself.

    Args:
        module: Student and objective, which is one without labels and logits.
        targets: Makes a batch's targets.
        loader: Batches of this process, from a cache of the same teacher.
        accelerator: Accelerator with device, precision and processes.
    """

    def __init__(
        self,
        module: DistillationModule,
        targets: nn.Module,
        loader: EpochLoader,
        accelerator: Accelerator,
    ) -> None:
        self._module, self._loader, self._accelerator = module, loader, accelerator
        self._targets = targets.to(accelerator.device)
        self._coordinator = Coordinator(accelerator.num_processes)

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        """Return the loss; the modes of all modules are restored."""
        module, student = self._module, self._module.student
        own = student.model
        modes = {part: part.training for part in (*module.modules(), *model.modules())}
        student.model = model
        module.eval()
        try:
            total, number = self._coordinator.together(self._sum)
        finally:
            student.model = own
            for part, training in modes.items():
                part.training = training
        shares = self._coordinator.collect((total, number))
        totals, numbers = zip(*shares, strict=True)
        return {"feature_loss": sum(totals) / sum(numbers)}

    @torch.inference_mode()
    def _sum(self) -> tuple[float, int]:
        """Return the sum of the losses of this process's batches, and their number."""
        total, device = 0.0, self._accelerator.device
        for batch in self._loader.epoch(0):
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            with self._accelerator.autocast():
                targets = self._targets(on_device)
                output = self._module(on_device["pixels"], on_device["label"], targets)
            total += float(output.losses["total"])
        return total, self._loader.num_batches


def halves(images: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Divide labelled images into two halves with the same share of each class.

    Raises:
        DataError: There are fewer than two images.
    """
    if len(images) < 2:
        raise DataError(
            f"{images.location}: has {len(images)} labelled image, which cannot be divided into"
            " queries and neighbours; give the neighbours with --knn-split"
        )
    # Sorted by class, every second image; a class of one image is a query of either half.
    order = np.argsort(images.labels, kind="stable")
    return images.taken(np.sort(order[0::2])), images.taken(np.sort(order[1::2]))
