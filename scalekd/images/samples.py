"""An indexed image set: read at random by position, found by key.

:func:`scalekd.images.open_dataset` makes one. Nothing is decoded here.
"""

import errno
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from scalekd.errors import DataError, EnvironmentFault, UsageError, advice_on
from scalekd.storage import Storage
from scalekd.storage.in_flight import submit

_MAX_GAP_BYTES = 64 << 10  # between two images of a shard that one request fetches: labels, headers
_MAX_REQUEST_BYTES = 16 << 20

Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sample:
    """One item of an image set.

    Attributes:
        key: Its stable name.
        image: The encoded image, as stored.
        label: Class number, or -1 where the set names none.
    """

    key: str
    image: bytes
    label: int

    @property
    def source_hash(self) -> int:
        """xxh3-64 of the encoded bytes."""
        return xxhash.xxh3_64_intdigest(self.image)


@dataclass(frozen=True)
class ImageDataset:
    """An indexed image set; build one with :func:`open_dataset`.

    The index is a few NumPy arrays, so that workers share it and its size stays flat.

    Attributes:
        place: What was opened, for messages.
        files: The files that hold images.
        keys: UTF-8 keys, one fixed-width byte string a sample.
        labels: Class numbers, or -1.
        file_numbers: Which of ``files`` holds the image.
        offsets: Where in the file the image begins.
        sizes: Encoded bytes of the image.
        class_names: Name of each class where the set tells.
        storage: Where ``files`` are, if not on this machine.
        versions: Of ``files`` there.
    """

    place: str
    files: tuple[str, ...]
    keys: Rows
    labels: Rows
    file_numbers: Rows
    offsets: Rows
    sizes: Rows
    class_names: tuple[str, ...] | None
    storage: Storage | None = None
    versions: tuple[str, ...] = ()

    @property
    def is_remote(self) -> bool:
        """Whether images come over a network."""
        return self.storage is not None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            DataError: The file is gone or shorter than it was when indexed.
        """
        number, size = int(self.file_numbers[index]), int(self.sizes[index])
        image = self._read(number, int(self.offsets[index]), size)
        if len(image) != size:
            raise DataError(
                f"{self.files[number]} ends inside sample {self.key(index)}: {len(image):,} of"
                f" {size:,} bytes; the file changed or was cut since it was opened"
            )
        return Sample(self.key(index), image, int(self.labels[index]))

    def read_many(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Read samples in the order given; those that lie together in a remote shard at once.

        Raises:
            DataError: As for one sample.
        """
        if self.storage is None:
            yield from (self[position] for position in positions)
            return
        runs: list[tuple[list[int], Future[bytes]]] = []
        for run in self._runs(positions):
            start, end = int(self.offsets[run[0]]), int(self.offsets[run[-1]] + self.sizes[run[-1]])
            number = int(self.file_numbers[run[0]])
            runs.append((run, submit(self._read, number, start, end - start)))
        for run, request in runs:
            data, start = request.result(), int(self.offsets[run[0]])
            for position in run:
                first = int(self.offsets[position]) - start
                image = data[first : first + int(self.sizes[position])]
                yield Sample(self.key(position), image, int(self.labels[position]))

    def _runs(self, positions: Sequence[int]) -> Iterator[list[int]]:
        """Neighbours among ``positions`` that one request fetches."""
        run: list[int] = []
        for position in positions:
            if run and not self._continues(run, position):
                yield run
                run = []
            run.append(position)
        if run:
            yield run

    def _continues(self, run: list[int], position: int) -> bool:
        gap = self.offsets[position] - self.offsets[run[-1]] - self.sizes[run[-1]]
        end = self.offsets[position] + self.sizes[position]
        return bool(
            self.file_numbers[position] == self.file_numbers[run[-1]]
            and 0 <= gap <= _MAX_GAP_BYTES
            and end - self.offsets[run[0]] <= _MAX_REQUEST_BYTES
        )

    def _read(self, number: int, start: int, size: int) -> bytes:
        path = self.files[number]
        if self.storage is not None:
            return self.storage.read_range(path, start, size, version=self.versions[number])
        try:
            with Path(path).open("rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # not the data's fault
                raise EnvironmentFault(f"cannot read {path}: {advice_on(error)}") from error
            raise DataError(f"cannot read {path}: {error.strerror}") from error

    def key(self, index: int) -> str:
        return bytes(self.keys[index]).decode()

    @cached_property
    def _by_key(self) -> Rows:
        return np.argsort(self.keys, kind="stable")

    def positions(self, keys: Rows) -> Rows:
        """Position of each of ``keys``, or -1 where the set has no such sample."""
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

    def limited(self, limit: int | None) -> "ImageDataset":
        """The first ``limit`` samples, or all."""
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise UsageError(f"--limit {limit}: at least one sample is needed")
        columns = ("keys", "labels", "file_numbers", "offsets", "sizes")
        return replace(self, **{name: getattr(self, name)[:limit] for name in columns})
