"""The image set that a cache embeds."""

import numpy as np

from scalekd.cache import CacheReader, open_cache
from scalekd.cache.forms import ZARR, read_form
from scalekd.errors import UsageError
from scalekd.images import ImageDataset, ImageOptions, open_dataset
from scalekd.images.hugging_face import PREFIX
from scalekd.images.stored import StoredImages
from scalekd.storage import LocalCache, open_storage


class EmbeddedImages(StoredImages):
    """Images of pass 0 of a cache whose tars embed the encoded images.

    The digests of the tars are not checked. Code that draws views compares each image with its hash
    in the cache.
    """

    @classmethod
    def of(cls, reader: CacheReader) -> "EmbeddedImages":
        """Return the image set of a cache.

        Raises:
            UsageError: The cache embeds no images.
            CacheCorrupt: An index is damaged.
        """
        samples = reader.samples
        if reader.embed != "source":
            raise UsageError(f"{reader.location}: has no encoded images; pass --data-dir")
        versions: list[str] = []
        files: list[str] = []
        numbers, extents = [np.empty(0, np.int32)], [np.empty((0, 2), np.int64)]
        for shard, count in enumerate(np.diff(samples.starts).tolist()):
            if not count:
                continue  # every image of the shard was corrupt
            tar, ranges = reader.image_ranges(0, shard)
            digest = reader.record(0, shard).files[tar]
            numbers.append(np.full(count, len(files), np.int32))
            extents.append(ranges)
            versions.append(f"{digest.num_bytes}-{digest.sha256}")
            files.append(tar)
        columns = np.concatenate(extents)
        return cls(
            location=reader.location,
            keys=samples.keys,
            labels=samples.labels,
            sizes=columns[:, 1],
            class_names=reader.identity.data.class_names,
            storage=reader.storage,
            files=tuple(files),
            versions=tuple(versions),
            file_numbers=np.concatenate(numbers),
            offsets=columns[:, 0],
        )


def open_images(
    data_dir: str,
    split: str = "train",
    *,
    local_cache: LocalCache | None = None,
    options: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
) -> ImageDataset:
    """Index an image set, or the images that a cache embeds.

    Args:
        data_dir: Location of an image set (see :func:`scalekd.images.open_dataset`), or of a cache,
            which has only the split ``train``.
        split: Split of the image set.
        local_cache: Local cache that keeps copies of remote files.
        options: Choice of images, labels and keys of an image set; ignored for a cache.

    Raises:
        DataError, UsageError: See :func:`scalekd.images.open_dataset`.
        CacheCorrupt: The cache is damaged.
    """
    if split == "train" and not data_dir.startswith(PREFIX) and not set(data_dir) & set("*?[{"):
        storage = open_storage(data_dir, local_cache=local_cache)
        if read_form(storage) != ZARR:
            return EmbeddedImages.of(open_cache(storage))
    return open_dataset(data_dir, split, local_cache=local_cache, options=options)
