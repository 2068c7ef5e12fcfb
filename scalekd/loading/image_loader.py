"""Batches of an image set without a cache: a new view of every sample in every epoch.

A view depends only on seed, key and epoch, so a resumed run has the same views as an uninterrupted
one, for any number of workers and processes.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from scalekd.errors import ScaleKDError, UsageError
from scalekd.images import ImageDataset
from scalekd.loading._workers import error_as_value
from scalekd.loading.cached_views import Batch, BatchRequest
from scalekd.loading.drawing import DrawnViews, DrawRequest
from scalekd.loading.loader import ViewLoader
from scalekd.loading.order import EpochOrder
from scalekd.text import counted
from scalekd.views import ViewPolicy

_BLOCK_SIZE = 256  # neighbouring samples of the image set are read together


class ImageViews(Dataset[Batch]):
    """Draws batches of views of an image set.

    Args:
        views: Draws the views.
    """

    def __init__(self, views: DrawnViews) -> None:
        self._views = views

    def __getitems__(self, request: BatchRequest) -> Batch | ScaleKDError:
        """Return one batch; a worker returns errors, which reach the user unchanged."""
        return error_as_value(lambda: self._batch(request))

    def _batch(self, request: BatchRequest) -> Batch:
        samples = tuple(request.samples.tolist())
        drawn = self._views.draw(DrawRequest(request.pass_index, 0, samples))
        return {"pixels": drawn.pixels, "label": torch.from_numpy(drawn.labels.astype(np.int64))}


class ImageLoader(ViewLoader):
    """Epochs of freshly drawn views with their labels.

    A batch is a dictionary: ``pixels`` uint8 ``(batch, 3, height, width)`` and ``label`` int64
    ``(batch,)``.

    Args:
        images: The image set.
        policy: Distribution of the views.
        view_size: Height and width in pixels.
        batch_size: Views per batch on this rank.
        num_workers: Number of worker processes; with 0, this process draws the views.
        seed: Seed of the order and of the views, the same on every rank.
        rank, world_size: Rank of this process, and number of processes.

    Raises:
        UsageError: The image set has fewer samples than one batch of all ranks.
    """

    def __init__(
        self,
        images: ImageDataset,
        policy: ViewPolicy,
        *,
        view_size: tuple[int, int],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        blocks = tuple(
            (first, min(_BLOCK_SIZE, len(images) - first))
            for first in range(0, len(images), _BLOCK_SIZE)
        )
        order = EpochOrder(blocks, batch_size, seed, rank=rank, world_size=world_size)
        if order.num_batches == 0:
            raise UsageError(
                f"{images.location} has {len(images):,} labelled images, fewer than one batch of"
                f" {batch_size} on {counted(world_size, 'process')}; use a smaller -b"
            )
        super().__init__(
            ImageViews(DrawnViews(images, policy, seed, view_size)),
            order,
            passes=None,
            num_workers=num_workers,
            is_remote=images.is_remote,
        )
