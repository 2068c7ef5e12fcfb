"""Image sets, read at random by position and found by key.

Two forms: WebDataset shards (``.tar`` files of ``key.jpg`` and ``key.cls``) and folders with one
sub-folder a class. Both are indexed once by names and sizes alone; an image's bytes are read
when asked for. Nothing is decoded here, and nothing is unpickled: a label is a decimal number.
"""

import errno
import glob
import hashlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import webdataset.shardlists
import xxhash

from scalekd.errors import DataError, EnvironmentFault, UsageError, advice_on

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")
_LABEL_EXTENSIONS = ("cls", "cls.txt")
_CLASS_FILES = ("classes.txt", "classnames.txt")
_MAX_IMAGE_BYTES = 256 << 20
_MAX_KEY_BYTES = 4096
_TAR_BLOCK = 512
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Rows = np.ndarray[Any, Any]
_Row = tuple[str, int, int, int, int]  # key, file number, offset, size, label


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
    """

    place: str
    files: tuple[str, ...]
    keys: Rows
    labels: Rows
    file_numbers: Rows
    offsets: Rows
    sizes: Rows
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            DataError: The file is gone or shorter than it was when indexed.
        """
        path, size = self.files[self.file_numbers[index]], int(self.sizes[index])
        try:
            with Path(path).open("rb") as file:
                file.seek(int(self.offsets[index]))
                image = file.read(size)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # not the data's fault
                raise EnvironmentFault(f"cannot read {path}: {advice_on(error)}") from error
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(image) != size:
            raise DataError(
                f"{path} ends inside sample {self.key(index)}: {len(image):,} of {size:,} bytes;"
                " the file changed or was cut since it was opened"
            )
        return Sample(self.key(index), image, int(self.labels[index]))

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
        columns = {
            name: getattr(self, name)[:limit]
            for name in ("keys", "labels", "file_numbers", "offsets", "sizes")
        }
        return ImageDataset(
            place=self.place, files=self.files, class_names=self.class_names, **columns
        )


def open_dataset(data_dir: str, split: str = "train") -> ImageDataset:
    """Index an image set.

    Args:
        data_dir: A folder, or itself a glob or brace pattern of ``.tar`` files.
        split: ``train`` takes ``DIR/train-*.tar`` or the folder ``DIR/train/<class>/``; a pattern
            such as ``train-{000000..000009}.tar`` is taken below ``data_dir``.

    Raises:
        DataError: Nothing there, no images in it, a damaged shard, a key that stands twice.
    """
    root = Path(data_dir)
    if not root.is_dir() and (_is_pattern(data_dir) or data_dir.endswith(".tar")):
        return _index_tars(_expand(data_dir), data_dir, root.parent)
    if not root.is_dir():
        raise DataError(f"no data at {data_dir}: there is no such folder")
    if _is_pattern(split) or split.endswith(".tar"):
        pattern = str(root / split)
        return _index_tars(_expand(pattern), pattern, root)
    tars = sorted(str(path) for path in root.glob(f"{glob.escape(split)}-*.tar"))
    if tars:
        return _index_tars(tars, f"{root}/{split}-*.tar", root)
    if (root / split).is_dir():
        return _index_folder(root / split)
    found = sorted(entry.name for entry in root.iterdir())[:5]
    raise DataError(
        f"{root} has neither {split}-*.tar nor a folder {split}/"
        f" ({'it holds ' + ', '.join(found) if found else 'it is empty'})"
    )


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[{")


def _expand(pattern: str) -> list[str]:
    paths: list[str] = []
    for part in webdataset.shardlists.expand_urls(pattern):
        found = sorted(glob.glob(part))  # noqa: PTH207 (Path.glob refuses absolute patterns)
        if not found:
            raise DataError(f"no file matches {part}")
        paths.extend(found)
    return paths


def _index_tars(paths: Sequence[str], place: str, root: Path) -> ImageDataset:
    rows: list[_Row] = []
    for number, path in enumerate(paths):
        for key, offset, size, label in _tar_samples(path):
            rows.append((key, number, offset, size, label))
    return _dataset(place, paths, rows, _class_names(root))


def _tar_samples(path: str) -> Iterator[tuple[str, int, int, int]]:
    """``(key, offset, size, label)`` of each sample of a shard, in order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not stem:  # a hidden file, such as those macOS leaves beside images
                    continue
                key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                if extension in IMAGE_EXTENSIONS:
                    if key in images:
                        raise DataError(f"{path}: sample {key!r} has two images")
                    images[key] = (member.offset_data, member.size)
                elif extension in _LABEL_EXTENSIONS:
                    labels[key] = _label(tar, member, path)
            _check_end(tar, path)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable tar file ({error})") from error
    if not images:
        raise DataError(f"{path}: no image in it ({', '.join(IMAGE_EXTENSIONS)})")
    size = Path(path).stat().st_size
    for key, (offset, length) in images.items():
        if offset + length > size:
            raise DataError(f"{path} is cut short inside sample {key!r}")
        yield key, offset, length, labels.get(key, -1)


def _check_end(tar: tarfile.TarFile, path: str) -> None:
    """A tar file ends in blocks of zeros; ``tarfile`` also stops, in silence, at damage."""
    with Path(path).open("rb") as file:
        file.seek(tar.offset)
        if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
            raise DataError(
                f"{path}: damaged or cut short at byte {tar.offset:,}, where neither a member nor"
                " the end of the archive stands; fetch it again"
            )


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    file = tar.extractfile(member)
    text = file.read(32) if file and member.size <= 32 else b""
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise DataError(f"{path}: {member.name} is not a class number")
    return int(text)


def _index_folder(folder: Path) -> ImageDataset:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} has no class folders")
    paths: list[str] = []
    rows: list[_Row] = []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file():
                key = path.relative_to(folder).as_posix()
                rows.append((key, len(paths), 0, path.stat().st_size, label))
                paths.append(str(path))
    # Folders come sorted by class, and a block of a cache is read as it was written: without
    # this order, fixed by the keys alone, every block would hold one class.
    rows.sort(key=lambda row: xxhash.xxh3_128_digest(_key_bytes(row[0], str(folder))))
    return _dataset(str(folder), paths, rows, tuple(classes))


def _class_names(root: Path) -> tuple[str, ...] | None:
    for name in _CLASS_FILES:
        path = root / name
        if path.is_file():
            try:
                return tuple(path.read_text(encoding="utf-8").splitlines())
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: class names are not UTF-8 ({error})") from error
    return None


def _key_bytes(key: str, place: str) -> bytes:
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: the name of sample {key!r} is not UTF-8; rename it") from None
    if _CONTROL.search(key) or len(encoded) > _MAX_KEY_BYTES:
        raise DataError(
            f"{place}: the name of sample {key[:80]!r} holds a control character or has more than"
            f" {_MAX_KEY_BYTES:,} bytes; rename it"
        )
    return encoded


def _dataset(
    place: str,
    files: Sequence[str],
    rows: list[_Row],
    class_names: tuple[str, ...] | None,
) -> ImageDataset:
    if not rows:
        raise DataError(f"{place}: no image in it ({', '.join(IMAGE_EXTENSIONS)})")
    keys = np.array([_key_bytes(row[0], place) for row in rows], dtype=np.bytes_)
    ordered = np.sort(keys)
    doubled = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(doubled):
        raise DataError(
            f"{place}: the key {bytes(ordered[doubled[0]]).decode()!r} stands twice; a cache finds"
            " samples by key, so every key of a data set must be its own"
        )
    numbers = np.array([row[1:] for row in rows], dtype=np.int64)
    too_large = np.flatnonzero(numbers[:, 2] > _MAX_IMAGE_BYTES)
    if len(too_large):
        raise DataError(
            f"{place}: {rows[too_large[0]][0]!r} is larger than {_MAX_IMAGE_BYTES:,} bytes"
        )
    return ImageDataset(
        place=place,
        files=tuple(files),
        keys=keys,
        labels=numbers[:, 3].astype(np.int32),
        file_numbers=numbers[:, 0].astype(np.int32),
        offsets=numbers[:, 1],
        sizes=numbers[:, 2],
        class_names=class_names,
    )
