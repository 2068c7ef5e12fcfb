"""The images that a cache carries, as an image set."""

import numpy as np

from scalekd.cache import CacheReader
from scalekd.errors import UsageError
from scalekd.images.samples import ImageDataset
from scalekd.storage import LocalStorage


def embedded_image_set(reader: CacheReader) -> ImageDataset:
    """The image set of a cache whose tars embed the encoded images: those of pass 0.

    Images are read without a look at the tar's digest; whoever draws views of them holds each
    against the hash that the cache keeps of it.

    Raises:
        UsageError: The cache embeds none.
        CacheCorrupt: An index is damaged.
    """
    storage, samples = reader.storage, reader.samples
    if reader.embed != "source":
        raise UsageError(f"{reader.place}: has no encoded images; pass --data-dir")
    versions: list[str] = []
    files: list[str] = []
    numbers, places = [np.empty(0, np.int32)], [np.empty((0, 2), np.int64)]
    for shard, count in enumerate(np.diff(samples.starts).tolist()):
        if not count:
            continue  # every image of it was corrupt
        tar, found = reader.image_places(0, shard)
        numbers.append(np.full(count, len(files), np.int32))
        places.append(found)
        whole = reader.record(0, shard).files[tar]
        versions.append(f"{whole.num_bytes}-{whole.sha256}")
        files.append(str(storage.path(tar)) if isinstance(storage, LocalStorage) else tar)
    columns = np.concatenate(places)
    return ImageDataset(
        place=reader.place,
        files=tuple(files),
        keys=samples.keys,
        labels=samples.labels,
        file_numbers=np.concatenate(numbers),
        offsets=columns[:, 0],
        sizes=columns[:, 1],
        class_names=reader.identity.data.class_names,
        storage=None if isinstance(storage, LocalStorage) else storage,
        versions=tuple(versions),
    )
