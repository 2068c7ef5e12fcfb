"""Views of an image set without a cache: a new view of every sample in every epoch.

A view depends only on seed, key and epoch, so a resumed run sees the views of an uninterrupted one,
whatever the number of workers and processes.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from scalekd.errors import ScaleKDError, UsageError
from scalekd.images import ImageDataset
from scalekd.loading._workers import empty_batch, error_as_value
from scalekd.loading.cached_views import Batch, BatchRequest
from scalekd.loading.loader import ViewLoader
from scalekd.loading.order import EpochOrder
from scalekd.loading.views import draw_view
from scalekd.views import ViewPolicy

_BLOCK_SIZE = 256  # samples that follow one another in the image set are read together


class ImageViews(Dataset[Batch]):
    """Draws views of an image set, a batch at a time.

    Args:
        images: The image set.
        policy: Distribution of the views.
        seed: Seed of the views.
        view_size: Height and width in pixels.
    """

    def __init__(
        self, images: ImageDataset, policy: ViewPolicy, *, seed: int, view_size: tuple[int, int]
    ) -> None:
        self._images, self._policy = images, policy
        self._seed, self._view_size = seed, view_size

    def __getitems__(self, request: BatchRequest) -> Batch | ScaleKDError:
        """Return one batch. A worker returns an error, so that it reaches the user unchanged."""
        return error_as_value(lambda: self._batch(request))

    def _batch(self, request: BatchRequest) -> Batch:
        positions = [int(position) for position in request.samples]
        pixels = empty_batch((len(positions), *self._view_size, 3), torch.uint8)
        filled = pixels.numpy()
        for row, sample in enumerate(self._images.read_many(positions)):
            view = draw_view(
                sample,
                self._policy,
                seed=self._seed,
                pass_index=request.pass_index,
                view_size=self._view_size,
            )
            filled[row] = view.pixels
        labels = torch.from_numpy(self._images.labels[positions].astype(np.int64))
        return {"pixels": pixels.permute(0, 3, 1, 2), "label": labels}


class ImageLoader(ViewLoader):
    """Epochs of freshly drawn views with their labels.

    A batch is a dictionary: ``pixels`` uint8 ``(batch, 3, height, width)`` and ``label`` int64
    ``(batch,)``.

    Args:
        images: The image set.
        policy: Distribution of the views.
        view_size: Height and width in pixels.
        batch_size: Views per batch on this rank.
        num_workers: Processes that decode images; 0 decodes in this process.
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
                f" {batch_size} on {world_size} processes; use a smaller -b"
            )
        super().__init__(
            ImageViews(images, policy, seed=seed, view_size=view_size),
            order,
            passes=None,
            num_workers=num_workers,
            is_remote=images.is_remote,
        )
