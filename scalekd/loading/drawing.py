"""Batches of newly drawn views for the teacher, in the order in which they are cached."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scalekd.cache.forms import HAS_IMAGES, Embed
from scalekd.cache.writing.rows import SampleRows
from scalekd.errors import DataError, ScaleKDError
from scalekd.images.samples import ImageDataset, Sample
from scalekd.loading._workers import empty_batch, error_as_value, in_workers
from scalekd.loading.views import DrawnView, draw_view
from scalekd.views import ViewParams, ViewPolicy, encode_view


@dataclass(frozen=True)
class DrawRequest:
    """Request for the views of one batch, all of one shard.

    Attributes:
        pass_index: Pass of the views.
        shard: Shard of the samples.
        samples: Positions of the samples in the image set.
        last: Whether the shard ends with this batch.
    """

    pass_index: int
    shard: int
    samples: range | tuple[int, ...]
    last: bool = False


@dataclass(frozen=True)
class DrawnBatch:
    """Views drawn for the samples of a request.

    Attributes:
        request: Request of this batch.
        keys: Keys of the samples, in order.
        labels: Class numbers, or -1.
        source_hashes: xxh3-64 of the encoded images.
        params: Parameters that redraw each view.
        pixel_hashes: xxh3-64 of each view's pixels.
        pixels: uint8 ``(view, 3, height, width)``.
        skipped: Keys of corrupt images that were skipped.
        images: Encoded images to embed, if images are embedded.
    """

    request: DrawRequest
    keys: tuple[str, ...]
    labels: np.ndarray[Any, Any]
    source_hashes: np.ndarray[Any, Any]
    params: tuple[ViewParams, ...]
    pixel_hashes: np.ndarray[Any, Any]
    pixels: Tensor
    skipped: tuple[str, ...]
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class DrawnViews(Dataset[DrawnBatch]):
    """Draws the views of requested samples.

    Attributes:
        images: The image set.
        policy: Policy that draws views.
        seed: Seed of the cache's views.
        view_size: Height and width of the views.
        skip_corrupt: Skip images that cannot be decoded, instead of raising an error.
        embed: Kind of images to embed: batches contain the original encoded images for ``source``,
            and losslessly encoded views for ``view``.
    """

    images: ImageDataset
    policy: ViewPolicy
    seed: int
    view_size: tuple[int, int]
    skip_corrupt: bool = False
    embed: Embed = "none"

    def __getitems__(self, request: DrawRequest) -> DrawnBatch | ScaleKDError:
        """Return one batch; a worker returns errors, which reach the user unchanged."""
        return error_as_value(lambda: self.draw(request))

    def draw(self, request: DrawRequest) -> DrawnBatch:
        """Draw one batch.

        Raises:
            DataError: An image is corrupt and may not be skipped.
        """
        height, width = self.view_size
        pixels = empty_batch((len(request.samples), height, width, 3), torch.uint8)
        filled = pixels.numpy()
        rows: list[tuple[Sample, DrawnView]] = []
        skipped: list[str] = []
        for sample in self.images.read_many(request.samples):
            try:
                view = draw_view(
                    sample,
                    self.policy,
                    seed=self.seed,
                    pass_index=request.pass_index,
                    view_size=self.view_size,
                )
            except DataError:
                if not self.skip_corrupt:
                    raise
                skipped.append(sample.key)
                continue
            filled[len(rows)] = view.pixels
            rows.append((sample, view))
        return DrawnBatch(
            request=request,
            keys=tuple(sample.key for sample, _ in rows),
            labels=np.array([sample.label for sample, _ in rows], np.int32),
            source_hashes=np.array([sample.source_hash for sample, _ in rows], np.uint64),
            params=tuple(view.params for _, view in rows),
            pixel_hashes=np.array([view.pixel_hash for _, view in rows], np.uint64),
            pixels=pixels[: len(rows)].permute(0, 3, 1, 2),
            skipped=tuple(skipped),
            images=tuple(self._embedded(sample, view) for sample, view in rows)
            if self.embed in HAS_IMAGES
            else (),
        )

    def _embedded(self, sample: Sample, view: DrawnView) -> bytes:
        return sample.image if self.embed == "source" else encode_view(view.pixels)


def drawn_samples(
    views: DrawnViews, positions: Iterable[int], skipped: tuple[str, ...] | None
) -> tuple[SampleRows, tuple[str, ...]]:
    """Return the stored values of intact samples, and the keys of corrupt ones.

    Args:
        views: The image set, and whether corrupt images may be skipped.
        positions: Positions of the samples in the image set.
        skipped: Keys of the corrupt samples; if ``None``, images are decoded to find them.
    """
    if skipped is None:
        batches = [views.draw(DrawRequest(0, 0, (position,))) for position in positions]
        skipped = tuple(key for batch in batches for key in batch.skipped)
        positions = [batch.request.samples[0] for batch in batches]
    # Images are not kept: a shard of them may not fit into memory.
    kept = [
        (sample.key, sample.label, sample.source_hash)
        for sample in views.images.read_many(list(positions))
        if sample.key not in skipped
    ]
    rows = SampleRows(
        tuple(key for key, _, _ in kept),
        np.array([label for _, label, _ in kept], np.int32),
        np.array([source_hash for _, _, source_hash in kept], np.uint64),
    )
    return rows, skipped


def shard_requests(
    shards: Iterable[tuple[int, int]], *, num_samples: int, shard_size: int, batch_size: int
) -> Iterator[DrawRequest]:
    """Yield the batches of shards in order; a batch never spans two shards.

    The samples that share a batch, and therefore the teacher's rounding, depend only on the batch
    size, not on the distribution of shards over processes.

    Args:
        shards: ``(pass, shard)`` pairs.
        num_samples: Number of samples in the cache.
        shard_size: Number of views per shard.
        batch_size: Number of views per batch.
    """
    for pass_index, shard in shards:
        first = shard * shard_size
        end = min(first + shard_size, num_samples)
        for start in range(first, end, batch_size):
            stop = min(start + batch_size, end)
            yield DrawRequest(pass_index, shard, range(start, stop), last=stop == end)


def drawing_loader(
    views: DrawnViews, requests: Iterable[DrawRequest], *, num_workers: int
) -> Iterator[DrawnBatch]:
    """Yield the batches of requests in order, drawn in worker processes.

    A request is taken from ``requests`` when a worker is free, so that the iterator may decide late
    which request comes next.

    Raises:
        DataError: An image is corrupt and may not be skipped.
    """
    yield from in_workers(
        views, requests, num_workers=num_workers, is_remote=views.images.is_remote
    )
