"""Images that are byte ranges of files in a folder, in tar shards or in a cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from scalekd.errors import DataError
from scalekd.images.samples import ImageDataset, Rows
from scalekd.storage import Storage, StoredFileError
from scalekd.storage.in_flight import submit

_MAX_GAP_BYTES = 64 << 10  # between two images of a shard that one request fetches: labels, headers
_MAX_REQUEST_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class StoredImages(ImageDataset):
    """An image set whose images are ranges of bytes in files.

    Attributes:
        storage: Storage of the files.
        files: Files that contain images.
        versions: Version of each of ``files`` in a remote store; empty for a local one.
        file_numbers: Index in ``files`` of the file that contains each image.
        offsets: First byte of each image in its file.
    """

    storage: Storage
    files: tuple[str, ...]
    versions: tuple[str, ...] = ()
    file_numbers: Rows
    offsets: Rows

    _columns: ClassVar[tuple[str, ...]] = (*ImageDataset._columns, "file_numbers", "offsets")

    @property
    def is_remote(self) -> bool:
        return self.storage.is_remote

    def read_images(self, positions: Sequence[int]) -> Iterator[bytes]:
        """Read encoded images; one request fetches neighbouring images of a remote file.

        Raises:
            DataError: A file is missing or shorter than it was when the set was opened.
        """
        if not self.is_remote:
            yield from (self._read([position]) for position in positions)
            return
        runs = list(self._runs(positions))
        # One request needs no thread, and may be made in one of the threads that others wait for.
        requests: list[Callable[[], bytes]] = [partial(self._read, run) for run in runs]
        if len(runs) > 1:
            requests = [submit(request).result for request in requests]
        for run, request in zip(runs, requests, strict=True):
            data, start = request(), int(self.offsets[run[0]])
            for position in run:
                first = int(self.offsets[position]) - start
                yield data[first : first + int(self.sizes[position])]

    def _runs(self, positions: Sequence[int]) -> Iterator[list[int]]:
        """Group neighbouring ``positions`` that one request fetches."""
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

    def _read(self, run: list[int]) -> bytes:
        """Read the bytes from the first image of a run to the end of its last."""
        number = int(self.file_numbers[run[0]])
        start, end = int(self.offsets[run[0]]), int(self.offsets[run[-1]] + self.sizes[run[-1]])
        version = self.versions[number] if self.versions else None
        try:
            return self.storage.read_range(self.files[number], start, end - start, version=version)
        except StoredFileError as error:
            raise DataError(
                f"cannot read sample {self.key(run[0])}: {error}; the file changed, or was moved or"
                " cut, since the image set was opened"
            ) from error
