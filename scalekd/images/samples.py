"""An image set: samples that are read by position and looked up by key.

:func:`scalekd.images.open_dataset` opens one. A source of images is a class here: it lists its
samples once, when it is opened, and reads encoded images when they are asked for. Nothing is
decoded.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import xxhash

from scalekd.errors import DataError, UsageError
from scalekd.images.left_out import shown
from scalekd.images.order import BLOCK_SIZE, is_sorted_by_class, mixed

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "bmp", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm"),
)
"""Extensions, in any case, of the formats that :func:`scalekd.views.decode_image` reads."""

MAX_IMAGE_BYTES = 256 << 20
_MAX_KEY_BYTES = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sample:
    """One item of an image set.

    Attributes:
        key: Stable name of the sample.
        image: The encoded image, as stored.
        label: Class number, or -1 if the sample has no label.
    """

    key: str
    image: bytes
    label: int

    @property
    def source_hash(self) -> int:
        """xxh3-64 of the encoded bytes."""
        return xxhash.xxh3_64_intdigest(self.image)


@dataclass(frozen=True, kw_only=True)
class ImageDataset(ABC):
    """An indexed image set.

    The index is a few NumPy arrays with one row per sample, so that worker processes share it.

    Attributes:
        location: Path, URL or name that was opened, for messages.
        keys: UTF-8 keys, one fixed-width byte string per sample.
        labels: Class numbers, or -1.
        sizes: Encoded bytes of each image.
        class_names: Name of each class, if the set has names.
        notes: Messages to show before the set is used, one line each: files that were left
            out, samples without a label, a changed order.

    Raises:
        DataError: An image is larger than 256 MiB, which no worker should read into memory.
    """

    location: str
    keys: Rows
    labels: Rows
    sizes: Rows
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    _columns: ClassVar[tuple[str, ...]] = ("keys", "labels", "sizes")
    """Arrays with one row a sample."""

    def __post_init__(self) -> None:
        too_large = np.flatnonzero(self.sizes > MAX_IMAGE_BYTES)
        if len(too_large):
            key = self.key(int(too_large[0]))
            raise DataError(
                f"{self.location}: {shown(key)} has more than {MAX_IMAGE_BYTES:,} bytes"
            )

    @property
    @abstractmethod
    def is_remote(self) -> bool:
        """Whether images come over a network."""

    @abstractmethod
    def read_images(self, positions: Sequence[int]) -> Iterator[bytes]:
        """Read encoded images in the order given.

        Raises:
            DataError: An image is gone or is not as long as it was when the set was opened.
        """

    def stored_order(self) -> Self:
        """Return the same samples in the order in which the source stores them."""
        return self

    def read_many(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Read samples in the order given.

        Raises:
            DataError: An image is gone or is not as long as it was when the set was opened.
        """
        images = self.read_images(positions)
        for position, image in zip(positions, images, strict=True):
            yield Sample(self.key(position), image, int(self.labels[position]))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample."""
        return next(self.read_many([index]))

    def key(self, index: int) -> str:
        """Return the key of a sample."""
        return bytes(self.keys[index]).decode()

    @cached_property
    def _by_key(self) -> Rows:
        return np.argsort(self.keys, kind="stable")

    def positions(self, keys: Rows) -> Rows:
        """Return the position of each of ``keys``, or -1 where the set has no such sample."""
        width = max(self.keys.dtype.itemsize, keys.dtype.itemsize)
        ordered = self.keys[self._by_key].astype(f"S{width}")
        keys = keys.astype(f"S{width}")
        slots = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
        return np.where(ordered[slots] == keys, self._by_key[slots], -1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over keys, labels and encoded sizes, in order."""
        hasher = hashlib.sha256()
        hasher.update(b"\n".join(bytes(key) for key in self.keys))
        for column in (self.labels, self.sizes):
            hasher.update(np.ascontiguousarray(column, "<i8").tobytes())
        return hasher.hexdigest()

    @property
    def num_classes(self) -> int:
        """Number of classes: the names' where known, else one more than the largest label."""
        if self.class_names:
            return len(self.class_names)
        return int(self.labels.max(initial=-1)) + 1

    def limited(self, limit: int | None) -> Self:
        """Return the first ``limit`` samples, or all."""
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise UsageError(f"--limit {limit}: at least one sample is needed")
        return self.taken(np.arange(limit))

    def labelled(self) -> Self:
        """Return the samples that have a label; a note says how many others are left out."""
        missing = np.flatnonzero(self.labels < 0)
        if not len(missing):
            return self
        note = (
            f"{self.location}: {len(missing):,} of {len(self):,} images have no label and are left"
            f" out, such as {shown(self.key(int(missing[0])))}"
        )
        chosen = self.taken(np.flatnonzero(self.labels >= 0))
        return replace(chosen, notes=(*self.notes, note))

    def taken(self, positions: Rows) -> Self:
        """Return the samples at ``positions``, in that order."""
        return replace(self, **{name: getattr(self, name)[positions] for name in self._columns})

    def mixed_unless_shuffled(self) -> Self:
        """Mix samples that are sorted by class; keep the order of those that are shuffled.

        Samples without labels are mixed where that makes reading no slower, so that folders, shards
        and tables of the same keys give the same cache.
        """
        if (self.labels < 0).all():
            if self.is_remote and len(self) > BLOCK_SIZE:
                return self
            why = "has no labels that would show whether it is shuffled"
        elif is_sorted_by_class(self.labels):
            why = "is sorted by class"
        else:
            return self
        note = f"{self.location}: {why}, so its samples are taken in an order that mixes them"
        if self.is_remote:
            note += "; shuffle the shards if reading them in that order is slow"
        # One block is read as a whole, in whatever order it was written.
        notes = (*self.notes, note) if len(self) > BLOCK_SIZE else self.notes
        return replace(self.taken(mixed(self.keys)), notes=notes)

    def with_fingerprint(
        self, fingerprint: str, limit: int | None, keys: Rows | None = None
    ) -> Self | None:
        """Return the first ``limit`` samples, or all, in the order that has this fingerprint.

        Caches written before samples sorted by class were mixed hold them in the order of the
        source. A source whose samples were distributed over other files since has its ``keys`` in
        another order than the cache.
        """
        for ordered in (self, self.stored_order()):
            if (chosen := ordered.limited(limit)).fingerprint == fingerprint:
                return chosen
        positions = None if keys is None else self.positions(keys)
        if positions is not None and (positions >= 0).all():
            chosen = self.taken(positions)
            return chosen if chosen.fingerprint == fingerprint else None
        return None


def encoded_keys(keys: Sequence[str], location: str) -> Rows:
    """Encode keys as an array of UTF-8.

    Raises:
        DataError: A key occurs twice, or cannot be stored in a cache.
    """
    encoded = np.array([_key_bytes(key, location) for key in keys], dtype=np.bytes_)
    ordered = np.sort(encoded)
    doubled = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(doubled):
        key = bytes(ordered[doubled[0]]).decode()
        raise DataError(
            f"{location}: the key {shown(key)} occurs twice; a cache finds samples by key, so every"
            " key of a data set must be unique"
        )
    return encoded


def _key_bytes(key: str, location: str) -> bytes:
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{location}: the name of sample {shown(key)} is not UTF-8; rename it"
        ) from None
    if _CONTROL.search(key) or len(encoded) > _MAX_KEY_BYTES:
        raise DataError(
            f"{location}: the name of sample {shown(key)} has a control character or more than"
            f" {_MAX_KEY_BYTES:,} bytes; rename it"
        )
    return encoded


def check_not_empty(num_samples: int, location: str, left_out: Sequence[str] = ()) -> None:
    """Refuse a set without images; the error lists the files that were left out.

    Raises:
        DataError: The set has no image.
    """
    if not num_samples:
        raise DataError(
            f"{location}: no image in it ({', '.join(IMAGE_EXTENSIONS)})"
            + "".join(f"; {line}" for line in left_out)
        )
