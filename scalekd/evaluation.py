"""How good a model is: top-1 and top-5 on a split, every sample counted exactly once.

Samples are dealt to the processes by position, however uneven that comes out; nothing is
exchanged until the end, when the counts are added. So no sample is padded, repeated or lost,
and the result is the same for every number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from scalekd.data import ImageDataset
from scalekd.data.drawing import DrawnViews, DrawRequest, drawing_loader
from scalekd.errors import DataError, UsageError
from scalekd.training.coordination import Coordinator
from scalekd.training.module import Normalise
from scalekd.views import CenterCrop, ViewPolicy


@dataclass(frozen=True)
class EvaluationConfig:
    """What the evaluated model wants its pixels to be.

    Attributes:
        img_size: Height and width in pixels.
        mean: Of RGB in 0..1.
        std: Of RGB in 0..1.
        crop_pct: Share of the resized shorter side that the centre crop keeps.
        interpolation: Resize filter.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    @property
    def policy(self) -> ViewPolicy:
        """Timm's evaluation view, drawn by the code that draws every other view."""
        bilinear = self.interpolation == "bilinear"
        return ViewPolicy(
            geometry=CenterCrop(self.crop_pct),
            interpolation="bilinear" if bilinear else "bicubic",
        )


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a model on an image set.

    Attributes:
        top1: Percent of samples whose class has the highest score.
        top5: Percent of samples whose class is among the five highest scores.
        loss: Mean cross entropy in nats.
        num_samples: Samples counted.
    """

    top1: float
    top5: float
    loss: float
    num_samples: int


class Evaluator:
    """Evaluates models on one image set; call it with a model, in every process.

    Args:
        images: The image set, with labels.
        config: Pixels that the models want.
        accelerator: Device, precision and processes.
        batch_size: Images a batch on each process.
        num_workers: Processes that decode images, for each process.
        class_map: For a subset of the model's classes: the model's class of each label. Other
            classes are not in the running, as is usual for subsets of ImageNet.

    Raises:
        DataError: A sample has no label.
        UsageError: ``class_map`` does not fit the labels.
    """

    def __init__(
        self,
        images: ImageDataset,
        config: EvaluationConfig,
        *,
        accelerator: Accelerator,
        batch_size: int,
        num_workers: int = 0,
        class_map: Sequence[int] | None = None,
    ) -> None:
        self._labels = np.asarray(images.labels)
        unlabelled = np.flatnonzero(self._labels < 0)
        if len(unlabelled):
            raise DataError(
                f"{images.place}: sample {images.key(int(unlabelled[0]))} has no label, so nothing "
                "can be evaluated on it"
            )
        if class_map is not None and int(self._labels.max()) >= len(class_map):
            raise UsageError(
                f"the class map has {len(class_map)} lines and {images.place} has label "
                f"{int(self._labels.max())}; it needs a line for every label"
            )
        self._images = images
        self._config = config
        self._accelerator = accelerator
        self._coordinator = Coordinator(accelerator.num_processes)
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._class_map = None if class_map is None else torch.tensor(list(class_map))

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        """Metrics by name, as logs take them; see `evaluate`."""
        return asdict(self.evaluate(model))

    def evaluate(self, model: nn.Module) -> EvaluationResult:
        """Evaluate a bare timm model, in eval mode; its mode is put back afterwards.

        Raises:
            DataError: An image is corrupt, or a label is beyond the model's classes.
        """
        was_training = model.training
        model.eval()
        try:
            counts = self._coordinator.together(lambda: self._count(model))
        finally:
            model.train(was_training)
        shares = self._coordinator.collect(counts)
        first, fifth, loss, number = (sum(column) for column in zip(*shares, strict=True))
        return EvaluationResult(
            top1=100 * first / number,
            top5=100 * fifth / number,
            loss=loss / number,
            num_samples=int(number),
        )

    @torch.inference_mode()
    def _count(self, model: nn.Module) -> list[float]:
        """Hits at 1, hits at 5, summed loss and samples, of this process's share."""
        device = self._accelerator.device
        normalise = Normalise(self._config.mean, self._config.std).to(device)
        totals = torch.zeros(4, dtype=torch.float64)
        for pixels, labels in self._batches():
            with self._accelerator.autocast():
                logits = model(normalise(pixels.to(device, non_blocking=True)))
            totals += self._score(logits.float(), labels.to(device)).cpu()
        return [float(total) for total in totals]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        mine = range(rank, len(self._images), world)
        requests = [
            DrawRequest(0, 0, tuple(mine[start : start + self._batch_size]))
            for start in range(0, len(mine), self._batch_size)
        ]
        views = DrawnViews(
            self._images, self._config.policy, seed=0, view_size=self._config.img_size
        )
        for batch in drawing_loader(views, requests, num_workers=self._num_workers):
            yield batch.pixels, torch.from_numpy(batch.labels.astype(np.int64))

    def _score(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._class_map is not None:
            logits = logits[:, self._class_map.to(logits.device)]
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"{self._images.place}: label {int(labels.max())} is beyond the model's "
                f"{logits.shape[1]} classes; it was trained on another set of classes"
            )
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        number = torch.tensor(float(len(labels)), device=logits.device)
        return torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, number]).double()
