"""Batches of replayed views with the teacher's targets for them.

Worker processes read targets one block at a time, compare each image and view with the cache, and
write a batch into shared memory, in the integer types that the codecs store. Targets are decoded
later, on the training device.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from scalekd.cache import CacheReader, JoinedReader
from scalekd.cache.forms import HAS_IMAGES, IMAGE, RENDERED, Embed
from scalekd.cache.layout import DIFFERENCES
from scalekd.errors import CacheMismatch, ScaleKDError, UsageError
from scalekd.images.samples import ImageDataset, Sample
from scalekd.loading._workers import empty_batch, error_as_value
from scalekd.loading.blocks import Block, BlockReader, gather
from scalekd.loading.order import BUFFER_BLOCKS, LANES_PER_RANK, Indices
from scalekd.loading.views import (
    Pixels,
    ReplayContract,
    check_stored_pixels,
    replay_view,
    sample_positions,
    stored_params,
)
from scalekd.storage.in_flight import Prefetcher
from scalekd.views import decode_view, undo_differences

CHECKED_BATCHES = 4
"""Number of batches at the start of an epoch of which every view is checked."""

CHECK_ONE_IN = 100
"""One in this many views of later batches is checked if checking needs a second drawing."""

_MAX_PENDING_IMAGES = 4096  # a limit that is not reached: only the next batches are requested

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class BatchRequest:
    """The batch that a worker is to make.

    Attributes:
        epoch: Number of the epoch.
        pass_index: Pass of the views.
        number: Number of the batch in its epoch.
        samples: Samples of the batch.
        next_samples: Samples of the batches that the same worker makes next.
    """

    epoch: int
    pass_index: int
    number: int
    samples: Indices
    next_samples: Indices


def embedded_images(reader: CacheReader | JoinedReader, view_size: tuple[int, int]) -> Embed:
    """Return the kind of embedded images from which the student's views are made, or ``none``.

    Embedded views have the teacher's size. Views of another size are drawn from the images of the
    data set, not from embedded views, which would be resized a second time.
    """
    if reader.embed in RENDERED and view_size != reader.identity.views.view_size:
        return "none"
    return reader.embed


def fresh_pass(passes: tuple[int, ...], epoch: int) -> int | None:
    """Return the pass to draw in an epoch; ``None`` if one of the cached ``passes`` is read.

    A view depends only on seed, key and pass, so the views of later passes are those that
    ``cache-teacher`` would draw with more passes. With all passes of a cache, the pass is the
    number of the epoch; with a part of the passes, new passes follow the last of them.
    """
    beyond = epoch - len(passes)
    return None if beyond < 0 else passes[-1] + 1 + beyond


def _why_images(reader: CacheReader | JoinedReader, view_size: tuple[int, int]) -> str:
    """Return the error message for a missing image set."""
    if reader.embed in RENDERED:
        height, width = reader.identity.views.view_size
        if view_size == (height, width):
            return (
                f"{reader.location}: contains the views of {len(reader.passes)} passes, and further"
                " epochs draw theirs from the images; pass --data-dir, or train as many epochs"
            )
        return (
            f"{reader.location}: contains views of {height} x {width} pixels, and the student takes"
            f" {view_size[0]} x {view_size[1]}; pass --data-dir, so that views of that size are"
            f" drawn from the images, or --img-size {height}"
        )
    return (
        f"--data-dir is missing: {reader.location} contains targets but no images; pass"
        " the images that it was made from"
    )


def is_checked(sample: int, epoch: int) -> bool:
    """Return whether a view of a later batch is checked if that needs a second drawing.

    A hash decides, so that each epoch checks other samples.
    """
    return xxhash.xxh3_64_intdigest(struct.pack("<qq", sample, epoch)) % CHECK_ONE_IN == 0


def _named(label: int, class_names: tuple[str, ...] | None) -> str:
    """Return the name of a class for messages."""
    if label < 0:
        return "no class"
    if class_names is None or label >= len(class_names):
        return f"class {label}"
    return f"class {label} ({class_names[label]!r})"


class CachedViews(Dataset[Batch]):
    """Makes batches of views of a cache.

    Args:
        reader: The cache.
        images: The image set, which must contain every sample of the cache. It is neither needed
            nor read if the cache embeds the images, or the views at the student's size.
        view_size: Height and width for the student; the teacher's when ``None``.
        groups: Groups of target arrays to read, such as ``("stage4", "logits")``.
        allowed_drift: See :class:`~scalekd.loading.views.ReplayContract`.
        teacher_pixels: Also return each view at the teacher's size, if the student's size differs.
        fresh_views: Draw the views of epochs beyond the cache's passes. No targets are read.
        differences: If the cache embeds pixels, return ``differences`` instead of ``pixels``, for
            :func:`scalekd.views.undo_differences` on the training device. Workers then check only
            the views of the first batches and 1 % of the others; otherwise all views.
        kept_blocks: Number of blocks that a worker keeps in memory.

    Raises:
        CacheMismatch: The image set lacks samples of the cache or gives them other labels, or the
            witnesses differ.
        UsageError: An image set is needed.
    """

    def __init__(
        self,
        reader: CacheReader | JoinedReader,
        images: ImageDataset | None,
        *,
        view_size: tuple[int, int] | None = None,
        groups: tuple[str, ...] = (),
        allowed_drift: float = 0.0,
        teacher_pixels: bool = False,
        fresh_views: bool = False,
        differences: bool = False,
        kept_blocks: int = LANES_PER_RANK * BUFFER_BLOCKS,
    ) -> None:
        views = reader.identity.views
        self.reader = reader
        self.images = images
        self.view_size = view_size or views.view_size
        self.teacher_pixels = teacher_pixels and self.view_size != views.view_size
        self.embedded = embedded_images(reader, self.view_size)
        self.fresh_views = fresh_views
        self.differences = differences
        draws_images = self.embedded == "none" or (fresh_views and self.embedded in RENDERED)
        if draws_images and images is None:
            raise UsageError(_why_images(reader, self.view_size))
        if fresh_views and groups:
            raise ValueError("fresh views have no cached targets")
        self.contract = ReplayContract.of(reader, allowed_drift=allowed_drift)
        self.targets = [
            array.name for array in reader.layout.views if array.name.split("/")[0] in groups
        ]
        reader.require(*groups)
        self._positions = (
            sample_positions(images, reader) if images is not None and draws_images else None
        )
        self.drift = self._check_witnesses()
        self._check_labels()  # after the images: another data set has other labels as well
        if self.drift == 0:
            # This machine redraws the witnesses exactly, so any view that differs is an error.
            self.contract = replace(self.contract, allowed_drift=0.0)
        names = [*self.targets, "pixel_hash"]
        names += [a.name for a in reader.layout.views if a.name.startswith("view/")]
        names += [IMAGE] if self.embedded in HAS_IMAGES else []
        names += [DIFFERENCES] if self.embedded == "pixels" else []
        self._blocks = BlockReader(reader, names, kept_blocks=kept_blocks)
        self._samples: Prefetcher[int, Sample] = Prefetcher(self._read_sample, _MAX_PENDING_IMAGES)

    def _check_witnesses(self) -> float:
        """Redraw the witnesses, views of the first samples of the cache; return the drift."""
        if self.embedded in RENDERED:
            return 0.0  # nothing is drawn
        pixels = self.reader.witnesses
        samples = self._first_samples(len(pixels))
        for row, sample in enumerate(samples):
            self.contract.check_source(sample, int(self.reader.samples.source_hashes[row]))
        return self.contract.check_witnesses(samples, list(pixels))

    def _check_labels(self) -> None:
        """Compare the images' labels with the cache's, from which batches take theirs."""
        if self.images is None or self._positions is None:
            return
        samples, here = self.reader.samples, self.images.labels[self._positions]
        if (samples.labels < 0).all():
            return  # written with --labels none
        # An image without a label does not contradict the cache.
        changed = np.flatnonzero((here != samples.labels) & (here >= 0))
        if not len(changed):
            return
        first = int(changed[0])
        ours = _named(int(here[first]), self.images.class_names)
        theirs = _named(int(samples.labels[first]), self.reader.identity.data.class_names)
        raise CacheMismatch(
            f"{self.images.location} gives {len(changed):,} of the {len(samples):,} samples of the"
            f" cache another label, such as {samples.key(first)!r}: {ours} here, {theirs} in the"
            " cache. The student would train on the cache's labels; write the cache again, or"
            " restore the labels (class folders with images are numbered in order of name)"
        )

    def __len__(self) -> int:
        return len(self.reader.samples)

    def __getitems__(self, request: BatchRequest) -> Batch | ScaleKDError:
        """Return one batch; a worker returns errors, which reach the user unchanged."""
        return error_as_value(lambda: self._batch(request))

    def _batch(self, request: BatchRequest) -> Batch:
        count = len(request.samples)
        labels = torch.from_numpy(self.reader.samples.labels[request.samples].astype(np.int64))
        batch = {"label": labels}
        self._prefetch(request)
        fresh = self._fresh_pass(request)
        rows: list[tuple[Block, int]] = [({}, 0)] * count
        if fresh is None or self.embedded == "source":
            rows = [
                self._blocks.find(request.pass_index, int(sample)) for sample in request.samples
            ]
        if fresh is None and self.embedded == "pixels":
            batch |= self._stored_pixels(request, rows)
        else:
            batch |= self._rendered(request, rows, fresh)
        for name in self.targets:
            first = rows[0][0][name]
            dtype = torch.from_numpy(np.empty(0, first.dtype)).dtype
            tensor = empty_batch((count, *first.shape[1:]), dtype)
            gather(rows, name, tensor.numpy())
            batch[name.replace("/", ".")] = tensor
        return batch

    def _rendered(
        self, request: BatchRequest, rows: Sequence[tuple[Block, int]], fresh: int | None
    ) -> Batch:
        """Return the pixels of a batch, drawn from images or decoded from embedded views."""
        count = len(request.samples)
        pixels = empty_batch((count, *self.view_size, 3), torch.uint8)
        filled = pixels.numpy()
        batch = {"pixels": pixels.permute(0, 3, 1, 2)}
        seen = None
        if self.teacher_pixels:
            seen = empty_batch((count, *self.contract.view_size, 3), torch.uint8)
            batch["teacher_pixels"] = seen.permute(0, 3, 1, 2)
        for index, (sample, (block, row)) in enumerate(zip(request.samples, rows, strict=True)):
            checked: Pixels | None
            if fresh is not None:
                filled[index], checked = self._draw_fresh(int(sample), block, row, fresh)
            else:
                every = request.number < CHECKED_BATCHES or is_checked(int(sample), request.epoch)
                filled[index], checked = self._replay(
                    int(sample), block, row, check=every or self.teacher_pixels
                )
            if seen is not None:
                seen.numpy()[index] = checked
        return batch

    def _stored_pixels(self, request: BatchRequest, rows: Sequence[tuple[Block, int]]) -> Batch:
        """Return embedded pixels, or their differences, after comparing them with their hashes.

        The digests of files show only that they are the committed ones; the pixel hash shows that
        the teacher saw these pixels.
        """
        height, width = self.view_size
        count = len(request.samples)
        stored = empty_batch((count, 3, height, width), torch.uint8)
        gather(rows, DIFFERENCES, stored.numpy())
        checked = [
            index
            for index, sample in enumerate(request.samples.tolist())
            if not self.differences
            or request.number < CHECKED_BATCHES
            or is_checked(sample, request.epoch)
        ]
        whole = empty_batch((len(checked), height, width, 3), torch.uint8)
        whole.copy_(undo_differences(stored[checked]).permute(0, 2, 3, 1))
        for index, pixels in zip(checked, whole.numpy(), strict=True):
            block, row = rows[index]
            key = self.reader.samples.key(int(request.samples[index]))
            check_stored_pixels(key, pixels, int(block["pixel_hash"][row]))
        if self.differences:
            return {"differences": stored}
        return {"pixels": whole.permute(0, 3, 1, 2)}

    def _draw_fresh(
        self, index: int, block: Block, row: int, pass_index: int
    ) -> tuple[Pixels, Pixels]:
        """Draw a view of a later pass; return its pixels for the student and for the teacher."""
        sample = self._sample(index, block, row)
        view = self.contract.draw(sample, pass_index)
        if self.view_size == self.contract.view_size:
            return view.pixels, view.pixels
        return replay_view(sample, view.params, view_size=self.view_size), view.pixels

    def _replay(
        self, index: int, block: Block, row: int, *, check: bool
    ) -> tuple[Pixels, Pixels | None]:
        """Return the student's pixels and, if they were checked, the teacher's."""
        if self.embedded == "view":
            pixels = self._stored_view(index, block, row)
            return pixels, pixels
        sample = self._sample(index, block, row)
        params = stored_params(block, row, self.contract.policy)
        pixels = replay_view(sample, params, view_size=self.view_size)
        if self.view_size == self.contract.view_size:
            seen = pixels
        elif check:
            seen = replay_view(sample, params, view_size=self.contract.view_size)
        else:
            return pixels, None
        self.contract.check_pixels(sample.key, seen, int(block["pixel_hash"][row]))
        return pixels, seen

    def _fresh_pass(self, request: BatchRequest) -> int | None:
        return fresh_pass(self.reader.passes, request.epoch) if self.fresh_views else None

    def _sample(self, index: int, block: Block, row: int) -> Sample:
        """Return a sample with its encoded image, after comparing the image with its hash."""
        if self.embedded == "source":
            sample = self._embedded_sample(index, block[IMAGE][row])
        else:
            sample = self._samples.take(index)
        self.contract.check_source(sample, int(self.reader.samples.source_hashes[index]))
        return sample

    def _stored_view(self, index: int, block: Block, row: int) -> Pixels:
        """Return the pixels of an embedded view, after comparing them with their hash."""
        sample = self._embedded_sample(index, block[IMAGE][row])
        pixels = decode_view(sample.image, key=sample.key, view_size=self.view_size)
        self.contract.check_pixels(sample.key, pixels, int(block["pixel_hash"][row]))
        return pixels

    def _embedded_sample(self, index: int, image: bytes) -> Sample:
        samples = self.reader.samples
        return Sample(samples.key(index), image, int(samples.labels[index]))

    def _first_samples(self, count: int) -> list[Sample]:
        """Return the first samples of the cache, from the image set or the cache itself."""
        if self.images is not None and self._positions is not None:
            return list(self.images.read_many([int(p) for p in self._positions[:count]]))
        pass_index = self.reader.passes[0]
        images = (self.reader.read_rows(pass_index, row, 1, [IMAGE]) for row in range(count))
        return [self._embedded_sample(row, arrays[IMAGE][0]) for row, arrays in enumerate(images)]

    def _prefetch(self, request: BatchRequest) -> None:
        """Start fetching the remote files that this batch and the next ones need."""
        for samples in (request.samples, request.next_samples):
            numbers = [int(sample) for sample in samples]
            if self._fresh_pass(request) is None or self.embedded == "source":
                self._blocks.prefetch(request.pass_index, numbers)
            if self._positions is not None and self.images is not None and self.images.is_remote:
                self._samples.request(numbers)

    def _read_sample(self, index: int) -> Sample:
        if self.images is None or self._positions is None:
            raise UsageError(_why_images(self.reader, self.view_size))
        return self.images[int(self._positions[index])]
