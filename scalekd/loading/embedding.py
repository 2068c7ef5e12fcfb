"""Make the images that a converted cache embeds: encoded images, redrawn views, or pixels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scalekd.cache import CacheReader
from scalekd.cache.forms import IMAGE, RENDERED, Embed
from scalekd.cache.layout import DIFFERENCES
from scalekd.errors import ScaleKDError, UsageError, rewording
from scalekd.images.samples import ImageDataset, Sample
from scalekd.loading._workers import empty_batch, error_as_value, in_workers
from scalekd.loading.blocks import Block
from scalekd.loading.views import (
    PIXEL_ADVICE,
    Pixels,
    ReplayContract,
    check_stored_pixels,
    replay_view,
    sample_positions,
    stored_params,
)
from scalekd.views import (
    decode_view,
    encode_view,
    pixel_differences,
    undo_differences,
)

_EMBED_ADVICE = (
    "Install the versions of the cache, or embed the encoded images with --embed source, which need"
    " not be redrawn"
)


@dataclass(frozen=True)
class BlockRequest:
    """Request for the images of one block.

    Attributes:
        pass_index: Pass of the block.
        shard: Shard of the block.
        first, count: First sample of the block, and number of samples.
        last: Whether this is the last block of the shard.
    """

    pass_index: int
    shard: int
    first: int
    count: int
    last: bool


@dataclass(frozen=True)
class BlockImages:
    """The images of a block in order.

    Attributes:
        request: Request of this block.
        images: Encoded images or views; ``None`` if they are not embedded.
        differences: Differences of pixels, uint8 ``(view, 3, height, width)``; ``None`` if they are
            not embedded or are copied with the other arrays.
    """

    request: BlockRequest
    images: tuple[bytes, ...] | None = None
    differences: Tensor | None = None


class ImagesToEmbed(Dataset[BlockImages]):
    """Makes the images of blocks, and compares each with its hash in the cache.

    Args:
        reader: The cache that is converted.
        embed: Kind of images to make.
        images: The image set; not needed if the cache embeds images of this kind, or images from
            which they can be made.

    Raises:
        UsageError: An image set is needed.
        CacheMismatch: The image set lacks samples of the cache.
    """

    def __init__(self, reader: CacheReader, embed: Embed, images: ImageDataset | None) -> None:
        self._reader = reader
        self._embed = embed
        self._copies = embed == reader.embed
        self._restores = embed in RENDERED and reader.embed in RENDERED
        from_cache = self._copies or self._restores or reader.embed == "source"
        self._images = None if from_cache else images
        if embed != "none" and not from_cache and images is None:
            raise UsageError(
                f"--embed {embed}: {reader.location} contains no images to make them from; pass"
                " --data-dir, the images the cache was made from"
            )
        self._positions = sample_positions(self._images, reader) if self._images else None
        self._contract = ReplayContract.of(reader)
        self._columns = [a.name for a in reader.layout.views if a.name.startswith("view/")]

    @property
    def is_remote(self) -> bool:
        """Whether reading goes over a network."""
        return self._reader.is_remote or bool(self._images and self._images.is_remote)

    @property
    def makes_images(self) -> bool:
        """Whether images are made, and not copied or omitted."""
        return self._embed != "none" and not self._copies

    def __getitems__(self, request: BlockRequest) -> BlockImages | ScaleKDError:
        """Return one block; a worker returns errors, which reach the user unchanged."""
        return error_as_value(lambda: self._block(request))

    def _block(self, request: BlockRequest) -> BlockImages:
        if self._embed == "none" or (self._copies and self._embed == "pixels"):
            return BlockImages(request)  # embedded pixels are copied with the other arrays
        names = [*self._columns, "pixel_hash"]
        if not self._images:
            names.append(DIFFERENCES if self._reader.embed == "pixels" else IMAGE)
        rows = self._reader.read_rows(request.pass_index, request.first, request.count, names)
        if self._copies:
            return BlockImages(request, tuple(rows[IMAGE]))
        numbers = range(request.count)
        if self._embed == "pixels":
            height, width = self._contract.view_size
            views = empty_batch((request.count, 3, height, width), torch.uint8)
            for row in numbers:
                pixels = self._pixels(request.first + row, rows, row)
                views.numpy()[row] = pixel_differences(pixels.transpose(2, 0, 1)[None])[0]
            return BlockImages(request, differences=views)
        return BlockImages(
            request, tuple(self._image(request.first + row, rows, row) for row in numbers)
        )

    def _image(self, index: int, rows: Block, row: int) -> bytes:
        if self._embed == "source":
            return self._sample(index, rows, row).image
        return encode_view(self._pixels(index, rows, row))

    def _sample(self, index: int, rows: Block, row: int) -> Sample:
        table, contract = self._reader.samples, self._contract
        if self._images is not None and self._positions is not None:
            sample = self._images[int(self._positions[index])]
        else:
            sample = Sample(table.key(index), rows[IMAGE][row], int(table.labels[index]))
        contract.check_source(sample, int(table.source_hashes[index]))
        return sample

    def _pixels(self, index: int, rows: Block, row: int) -> Pixels:
        """Return the pixels that the teacher saw, stored or redrawn, after checking their hash."""
        contract, expected = self._contract, int(rows["pixel_hash"][row])
        if self._restores:
            key = self._reader.samples.key(index)
            if self._reader.embed == "pixels":
                stored = torch.from_numpy(rows[DIFFERENCES][row][None])
                pixels = undo_differences(stored)[0].permute(1, 2, 0).contiguous().numpy()
            else:
                size = contract.view_size
                pixels = decode_view(bytes(rows[IMAGE][row]), key=key, view_size=size)
            check_stored_pixels(key, pixels, expected)
            return pixels
        sample = self._sample(index, rows, row)
        params = stored_params(rows, row, contract.policy)
        pixels = replay_view(sample, params, view_size=contract.view_size)
        with rewording({PIXEL_ADVICE: _EMBED_ADVICE}):
            contract.check_pixels(sample.key, pixels, expected)
        return pixels


def images_of_blocks(
    source: ImagesToEmbed, requests: Iterable[BlockRequest], *, num_workers: int
) -> Iterator[BlockImages]:
    """Yield the images of blocks in order; worker processes make them unless they are copied.

    Raises:
        ScaleKDError: An image is missing, corrupt, or not the one the teacher saw.
    """
    if not source.makes_images:
        for request in requests:
            block = source.__getitems__(request)
            if isinstance(block, BlockImages):
                yield block
        return
    yield from in_workers(source, requests, num_workers=num_workers, is_remote=source.is_remote)
