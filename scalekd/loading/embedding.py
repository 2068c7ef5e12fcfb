"""Images for the tars of a cache: the encoded files of its samples, or its redrawn views."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from scalekd.cache import CacheReader
from scalekd.cache.forms import IMAGE, Embed
from scalekd.errors import ScaleKDError, UsageError, rewording
from scalekd.images.samples import ImageDataset, Sample
from scalekd.loading._workers import in_workers
from scalekd.loading.views import PIXEL_ADVICE, ReplayContract, found_samples, replay_view
from scalekd.views import encode_view, unpack_view

_EMBED_ADVICE = (
    "Install the versions of the cache, or embed the encoded files with --embed source, which need"
    " no pixels"
)


@dataclass(frozen=True)
class BlockRequest:
    """One block of a pass.

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
    """Images of a block in order; ``None`` if no images are embedded."""

    request: BlockRequest
    images: tuple[bytes, ...] | None


class ImagesToEmbed(Dataset[BlockImages]):
    """Makes the images of blocks, and compares each with its hash in the cache.

    Args:
        reader: The cache that is converted.
        embed: Kind of images to make.
        images: The image set; not needed if the cache already contains images of this kind, or
            the encoded images to make them from.

    Raises:
        UsageError: The image set is needed.
        CacheMismatch: The image set lacks samples of the cache.
    """

    def __init__(self, reader: CacheReader, embed: Embed, images: ImageDataset | None) -> None:
        held = reader.embed
        self._reader = reader
        self._embed = embed
        self._copies = embed == held
        self._images = None if held == "source" or self._copies else images
        if embed != "none" and not self._copies and held != "source" and images is None:
            raise UsageError(
                f"--embed {embed}: {reader.location} contains no images to make them from; pass"
                " --data-dir, the images the cache was made from"
            )
        self._positions = found_samples(self._images, reader) if self._images else None
        self._contract = ReplayContract.of(reader)
        self._columns = [a.name for a in reader.layout.views if a.name.startswith("view/")]

    @property
    def is_remote(self) -> bool:
        """Whether reading goes over a network."""
        return self._reader.is_remote or bool(self._images and self._images.is_remote)

    @property
    def is_work(self) -> bool:
        """Whether images are made here, rather than copied or left out."""
        return self._embed != "none" and not self._copies

    def __getitems__(self, request: BlockRequest) -> BlockImages | ScaleKDError:
        """Return one block. A worker returns an error, so that it reaches the user unchanged."""
        try:
            return BlockImages(request, self._block(request))
        except ScaleKDError as error:
            if get_worker_info() is None:
                raise
            return error

    def _block(self, request: BlockRequest) -> tuple[bytes, ...] | None:
        if self._embed == "none":
            return None
        names = [*self._columns, "pixel_hash"] + ([] if self._images else [IMAGE])
        rows = self._reader.read_rows(request.pass_index, request.first, request.count, names)
        if self._copies:
            return tuple(rows[IMAGE])
        return tuple(self._image(request.first + row, rows, row) for row in range(request.count))

    def _image(self, index: int, rows: dict[str, np.ndarray[Any, Any]], row: int) -> bytes:
        table, contract = self._reader.samples, self._contract
        if self._images is not None and self._positions is not None:
            sample = self._images[int(self._positions[index])]
        else:
            sample = Sample(table.key(index), rows[IMAGE][row], int(table.labels[index]))
        contract.check_source(sample, int(table.source_hashes[index]))
        if self._embed == "source":
            return sample.image
        columns = {name.removeprefix("view/"): rows[name] for name in self._columns}
        params = unpack_view(columns, row, contract.policy)
        pixels = replay_view(sample, params, contract.policy, view_size=contract.view_size)
        with rewording({PIXEL_ADVICE: _EMBED_ADVICE}):
            contract.check_pixels(sample, pixels, int(rows["pixel_hash"][row]))
        return encode_view(pixels)


def images_of_blocks(
    source: ImagesToEmbed, requests: Iterable[BlockRequest], *, num_workers: int
) -> Iterator[BlockImages]:
    """Yield the images of blocks in order; worker processes make them unless they are copied.

    Raises:
        ScaleKDError: An image is missing, corrupt, or not the one the teacher saw.
    """
    if not source.is_work:
        for request in requests:
            block = source.__getitems__(request)
            if isinstance(block, BlockImages):
                yield block
        return
    yield from in_workers(source, requests, num_workers=num_workers, is_remote=source.is_remote)
