"""Loaders of batches of replayed views with the teacher's targets."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from scalekd.cache import CacheReader, JoinedReader
from scalekd.errors import UsageError
from scalekd.images import ImageDataset
from scalekd.loading._workers import as_is, prepare_worker, relayed, start_method
from scalekd.loading.cached_views import Batch, BatchRequest, CachedViews
from scalekd.loading.order import BUFFER_BLOCKS, LANES_PER_RANK, EpochOrder, even_workers
from scalekd.text import counted

_BATCHES_AHEAD = 2
"""Number of a worker's next batches whose remote targets and images are prefetched."""


class _Requests(Sampler[BatchRequest]):
    """Yields the requests of epoch :attr:`epoch`, from batch :attr:`start` on."""

    def __init__(self, order: EpochOrder, passes: tuple[int, ...] | None, num_workers: int) -> None:
        self.order = order
        self.passes = passes
        self.num_workers = num_workers
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[BatchRequest]:
        # Workers take batches in turn, so a worker's next batch is `num_workers` batches later.
        epoch, start, step = self.epoch, self.start, max(1, self.num_workers)
        pass_index = epoch if self.passes is None else self.passes[epoch % len(self.passes)]
        batches = self.order.batches(epoch, start=start)
        seen = list(itertools.islice(batches, _BATCHES_AHEAD * step))
        for number in itertools.count(start):
            seen.extend(itertools.islice(batches, 1))
            if not seen:
                return
            ahead = [np.empty(0, np.int64), *seen[step::step][:_BATCHES_AHEAD]]
            yield BatchRequest(epoch, pass_index, number, seen.pop(0), np.concatenate(ahead))

    def __len__(self) -> int:
        return max(0, self.order.num_batches - self.start)


class ViewLoader:
    """Yields the batches of one rank, epoch by epoch; all ranks have the same number of batches.

    Each iteration over the loader yields one epoch, from the one of :meth:`set_epoch` on;
    :meth:`epoch` yields a given epoch, and can start in the middle of it.

    Args:
        views: Data set that returns the batch of a ``BatchRequest``.
        order: Order of the samples.
        passes: Passes that epochs use in turn; if ``None``, the pass is the number of the epoch.
        num_workers: Number of worker processes; with 0, this process makes the batches.
        is_remote: Whether views are read over a network.
    """

    def __init__(
        self,
        views: Dataset[Batch],
        order: EpochOrder,
        *,
        passes: tuple[int, ...] | None,
        num_workers: int,
        is_remote: bool,
    ) -> None:
        self._next_epoch = 0
        self._requests = _Requests(order, passes, num_workers)
        self._loader: DataLoader[Any] = DataLoader(
            views,
            batch_sampler=self._requests,  # type: ignore[arg-type]
            collate_fn=as_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),  # so that copies to the device need no host
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=prepare_worker,
            multiprocessing_context=start_method(is_remote=num_workers > 0 and is_remote),
        )

    @property
    def num_batches(self) -> int:
        """Number of batches of this rank per epoch."""
        return self._requests.order.num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        # The epoch is counted at the first batch, because frameworks create unused iterators.
        epoch = self._next_epoch
        self._next_epoch += 1
        yield from self.epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._next_epoch = epoch

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        Args:
            epoch: Number of the epoch.
            start_batch: Number of batches to skip at the start, without reading them.

        Raises:
            CacheMismatch: An image or view is not the one that the teacher saw.
            CacheCorrupt: The cache is damaged.
            DataError: An image cannot be read.
        """
        self._requests.epoch, self._requests.start = epoch, start_batch
        yield from relayed(self._loader)


class CachedViewLoader(ViewLoader):
    """Yields replayed views with the teacher's targets.

    Epochs use the cached passes in turn. With ``fresh_views``, epochs after the last pass draw new
    views instead.

    A batch is a dictionary with ``pixels``, uint8 ``(batch, 3, height, width)``, or their
    ``differences``; ``label``, int64 ``(batch,)``, -1 for samples without a label; a tensor for
    every plane of the target groups, such as ``stage4.codes``, view axis first; and on request, if
    the sizes differ, ``teacher_pixels``: the views at the teacher's size.

    Args:
        reader: The cache.
        images: The image set the cache was made from; see :class:`CachedViews`.
        batch_size: Views per batch on this rank.
        num_workers: Number of worker processes; with 0, this process makes the batches. For
            embedded pixels it is reduced to 1, 2, 4 or a multiple of 8; see
            :func:`.order.even_workers`.
        seed: Seed of the order, the same on every rank.
        view_size, groups, allowed_drift, teacher_pixels, fresh_views, differences: See
            :class:`CachedViews`.
        rank, world_size: Rank of this process, and number of processes.

    Raises:
        CacheMismatch: See :class:`CachedViews`.
        UsageError: The cache contains fewer views than one batch of all ranks.
    """

    def __init__(
        self,
        reader: CacheReader | JoinedReader,
        images: ImageDataset | None,
        *,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        view_size: tuple[int, int] | None = None,
        groups: tuple[str, ...] = (),
        allowed_drift: float = 0.0,
        teacher_pixels: bool = False,
        fresh_views: bool = False,
        differences: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        lanes = -(-LANES_PER_RANK // max(1, num_workers))
        self.views = CachedViews(
            reader,
            images,
            view_size=view_size,
            groups=groups,
            allowed_drift=allowed_drift,
            teacher_pixels=teacher_pixels,
            fresh_views=fresh_views,
            differences=differences,
            kept_blocks=lanes * BUFFER_BLOCKS,
        )
        if self.views.embedded == "pixels":
            num_workers = even_workers(num_workers)
        order = EpochOrder(
            tuple(reader.blocks()), batch_size, seed, rank=rank, world_size=world_size
        )
        if order.num_batches == 0:
            raise UsageError(
                f"the cache has {len(self.views):,} views, fewer than one batch of {batch_size} on"
                f" {counted(world_size, 'process')}; use a smaller -b"
            )
        super().__init__(
            self.views,
            order,
            passes=reader.passes,
            num_workers=num_workers,
            is_remote=reader.is_remote or (images is not None and images.is_remote),
        )
