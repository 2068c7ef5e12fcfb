"""Evaluation views, divided among processes so that every sample is evaluated once.

Samples are assigned by position; shares may differ in size, since no sample is padded or repeated.
Processes do not communicate, so that none waits for another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor

from scalekd.errors import DataError, UsageError
from scalekd.images import ImageDataset
from scalekd.loading.drawing import DrawnViews, DrawRequest, drawing_loader
from scalekd.models.normalise import Normalise
from scalekd.students import StudentSpec
from scalekd.teachers import TeacherSpec
from scalekd.views import CenterCrop, Interpolation, ViewPolicy


@dataclass(frozen=True)
class EvaluationConfig:
    """Size and preprocessing of an evaluated model's input.

    Attributes:
        img_size: Height and width in pixels.
        mean: Mean per RGB channel, in 0..1.
        std: Standard deviation per RGB channel, in 0..1.
        crop_pct: Share of the resized shorter side that the centre crop keeps.
        interpolation: Resize filter, one of `scalekd.views.Interpolation`.

    Raises:
        UsageError: Views do not support the filter.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in get_args(Interpolation):
            known = " or ".join(get_args(Interpolation))
            raise UsageError(
                f"the model's configuration asks for evaluation images resized with"
                f" {self.interpolation!r}, and scalekd resizes with {known}"
            )

    @classmethod
    def of(cls, spec: StudentSpec | TeacherSpec) -> "EvaluationConfig":
        """Return the configuration of a student's or teacher's specification."""
        return cls(spec.img_size, spec.mean, spec.std, spec.crop_pct, spec.interpolation)

    @property
    def policy(self) -> ViewPolicy:
        """Return the view policy of timm's evaluation view."""
        interpolation = cast(Interpolation, self.interpolation)
        return ViewPolicy(geometry=CenterCrop(self.crop_pct), interpolation=interpolation)


@dataclass(frozen=True)
class EvaluationBatch:
    """Normalised images on the device.

    Attributes:
        images: Normalised images ``(batch, 3, row, column)``.
        labels: Class of each image.
        positions: Index of each sample in the image set.
    """

    images: Float[Tensor, "batch 3 row column"]
    labels: Int64[Tensor, " batch"]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationViews:
    """One evaluation view of every sample of an image set.

    Attributes:
        images: The image set; every sample has a label.
        accelerator: Accelerator with device, precision and processes.
        batch_size: Number of images per batch and process.
        num_workers: Number of worker processes that decode images, per process.

    Raises:
        DataError: A sample has no label.
    """

    images: ImageDataset
    accelerator: Accelerator
    batch_size: int
    num_workers: int = 0

    def __post_init__(self) -> None:
        unlabelled = np.flatnonzero(self.images.labels < 0)
        if len(unlabelled):
            raise DataError(
                f"{self.images.location}: sample {self.images.key(int(unlabelled[0]))} has no"
                " label, so nothing can be evaluated on it"
            )

    @property
    def num_classes(self) -> int:
        """The largest label plus one."""
        return int(self.images.labels.max()) + 1

    def batches(self, config: EvaluationConfig) -> Iterator[EvaluationBatch]:
        """Yield the batches of this process's share, preprocessed for a model with ``config``.

        Raises:
            DataError: An image is corrupt.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        device = self.accelerator.device
        mine = range(rank, len(self.images), world)
        requests = [
            DrawRequest(0, 0, tuple(mine[start : start + self.batch_size]))
            for start in range(0, len(mine), self.batch_size)
        ]
        normalise = Normalise(config.mean, config.std).to(device)
        views = DrawnViews(self.images, config.policy, seed=0, view_size=config.img_size)
        for batch in drawing_loader(views, requests, num_workers=self.num_workers):
            yield EvaluationBatch(
                images=normalise(batch.pixels.to(device, non_blocking=True)),
                labels=torch.from_numpy(batch.labels.astype(np.int64)).to(device),
                positions=tuple(batch.request.samples),
            )
