"""Opening an image set: which samples it has, and where each stands.

Two forms: WebDataset shards (``.tar`` files of ``key.jpg`` and ``key.cls``) and folders with one
sub-folder a class. Both are indexed once by names and sizes alone; an image's bytes are read
when asked for. Nothing is decoded here, and nothing is unpickled: a label is a decimal number.
"""

import fnmatch
import glob
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import webdataset.shardlists
import xxhash

from scalekd.cache import open_cache
from scalekd.cache.webdataset.form import read_form
from scalekd.errors import DataError, UsageError
from scalekd.images.embedded import embedded_image_set
from scalekd.images.samples import ImageDataset
from scalekd.storage import (
    LocalCache,
    LocalStorage,
    NotStored,
    Storage,
    StoredFile,
    is_remote,
    open_storage,
)
from scalekd.storage.in_flight import REQUESTS_IN_FLIGHT, submit

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")
_LABEL_EXTENSIONS = ("cls", "cls.txt")
_CLASS_FILES = ("classes.txt", "classnames.txt")
_MAX_IMAGE_BYTES = 256 << 20
_MAX_KEY_BYTES = 4096
_TAR_BLOCK = 512
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_MAX_CLASS_FILE_BYTES = 16 << 20

_TarSample = tuple[str, int, int, int]  # key, offset, size, label
_Row = tuple[str, int, int, int, int]  # key, file number, offset, size, label


def open_dataset(
    data_dir: str, split: str = "train", *, local_cache: LocalCache | None = None
) -> ImageDataset:
    """Index an image set.

    Args:
        data_dir: A folder or URL, itself a glob or brace pattern of ``.tar`` files, or a cache
            that embeds its images, whose only split is ``train``.
        split: ``train`` takes ``DIR/train-*.tar`` or the folder ``DIR/train/<class>/``; a pattern
            such as ``train-{000000..000009}.tar`` is taken below ``data_dir``. Folders that hold
            images are classes, numbered in order of name; hidden files and folders count for
            nothing.
        local_cache: Keeps the shards of a remote set.

    Raises:
        DataError: Nothing there, no images in it, a damaged shard, a key that stands twice.
    """
    if is_remote(data_dir):
        return _open_remote(data_dir, split, local_cache)
    root = Path(data_dir)
    if not root.is_dir() and (_is_pattern(data_dir) or data_dir.endswith(".tar")):
        return _index_local_tars(_expand(data_dir), data_dir, root.parent)
    if not root.is_dir():
        raise DataError(f"no data at {data_dir}: there is no such folder")
    if _is_pattern(split) or split.endswith(".tar"):
        pattern = str(root / split)
        return _index_local_tars(_expand(pattern), pattern, root)
    if split == "train" and read_form(root) is not None:
        return embedded_image_set(open_cache(root))
    tars = sorted(str(path) for path in root.glob(f"{glob.escape(split)}-*.tar"))
    if tars:
        return _index_local_tars(tars, f"{root}/{split}-*.tar", root)
    if (root / split).is_dir():
        return _index_folder(root / split)
    found = sorted(entry.name for entry in root.iterdir())[:5]
    raise DataError(
        f"{root} has neither {split}-*.tar nor a folder {split}/"
        f" ({'it holds ' + ', '.join(found) if found else 'it is empty'})"
    )


def _open_remote(data_dir: str, split: str, local_cache: LocalCache | None) -> ImageDataset:
    place, pattern = data_dir.rstrip("/"), split
    if _is_pattern(data_dir) or data_dir.endswith(".tar"):
        place, _, pattern = data_dir.rpartition("/")
        if _is_pattern(place):
            raise UsageError(f"{data_dir}: only the last part of a URL can be a pattern")
    storage = open_storage(place, local_cache=local_cache)
    where = f"{place}/{pattern}"
    if _is_pattern(pattern) or pattern.endswith(".tar"):
        return _index_remote_tars(storage, _expand_remote(storage, pattern), where)
    if split == "train" and read_form(storage) is not None:
        return embedded_image_set(open_cache(storage))
    try:
        found = list(storage.list())
    except UsageError as error:
        raise UsageError(
            f"{error}: name the shards, as in --split '{split}-{{000000..000009}}.tar'"
        ) from None
    tars = [file for file in found if fnmatch.fnmatchcase(file.path, f"{split}-*.tar")]
    if tars:
        return _index_remote_tars(storage, sorted(tars, key=lambda file: file.path), where)
    images = [file for file in found if file.path.startswith(f"{split}/")]
    if images:
        return _index_remote_folder(storage, split, images)
    tops = sorted({file.path.split("/")[0] for file in found})[:5]
    raise DataError(
        f"{place} has neither {split}-*.tar nor a folder {split}/"
        f" ({'it holds ' + ', '.join(tops) if tops else 'it is empty'})"
    )


def _expand_remote(storage: Storage, pattern: str) -> list[StoredFile]:
    """Files that a glob or brace pattern names; only a glob needs the store to list them."""
    found: list[StoredFile] = []
    names = webdataset.shardlists.expand_urls(pattern)
    described = [None if _is_pattern(name) else submit(storage.describe, name) for name in names]
    for name, file in zip(names, described, strict=True):
        if file is not None:
            matching = [entry for entry in (file.result(),) if entry is not None]
        else:
            matching = [f for f in storage.list() if fnmatch.fnmatchcase(f.path, name)]
        if not matching:
            raise DataError(f"no file matches {storage.locate(name)}")
        found.extend(sorted(matching, key=lambda file: file.path))
    return found


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


@dataclass(frozen=True)
class _Shard:
    """One tar file: how to read it from its start, and some bytes of it."""

    name: str
    size: int
    open: Callable[[], BinaryIO]
    read: Callable[[int, int], bytes]


def _local_shard(path: str) -> _Shard:
    def read(start: int, count: int) -> bytes:
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read(count)

    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"{path}: not a readable tar file ({error})") from error
    return _Shard(path, size, lambda: Path(path).open("rb"), read)


def _remote_shard(storage: Storage, file: StoredFile) -> _Shard:
    return _Shard(
        storage.locate(file.path),
        file.size,
        lambda: storage.open(file.path, version=file.version),
        lambda start, count: storage.read_range(file.path, start, count, version=file.version),
    )


def _index_local_tars(paths: Sequence[str], place: str, root: Path) -> ImageDataset:
    samples = (_tar_samples(_local_shard(path)) for path in paths)
    return _dataset(place, paths, _numbered(samples), _class_names(LocalStorage(root)))


def _index_remote_tars(storage: Storage, files: Sequence[StoredFile], place: str) -> ImageDataset:
    """Each shard is read once, from its start to its end; several at once."""
    waiting = deque(files)
    coming: deque[Future[list[_TarSample]]] = deque()

    def samples() -> Iterator[list[_TarSample]]:
        while waiting or coming:
            while waiting and len(coming) < REQUESTS_IN_FLIGHT:
                coming.append(submit(_tar_samples, _remote_shard(storage, waiting.popleft())))
            yield coming.popleft().result()

    return replace(
        _dataset(place, [f.path for f in files], _numbered(samples()), _class_names(storage)),
        storage=storage,
        versions=tuple(file.version for file in files),
    )


def _numbered(shards: Iterable[list[_TarSample]]) -> list[_Row]:
    return [
        (key, number, offset, size, label)
        for number, samples in enumerate(shards)
        for key, offset, size, label in samples
    ]


def _tar_samples(shard: _Shard) -> list[_TarSample]:
    """``(key, offset, size, label)`` of each sample of a shard, in order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with (
            shard.open() as file,
            tarfile.open(fileobj=file, mode="r:" if file.seekable() else "r|") as tar,
        ):
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
                        raise DataError(f"{shard.name}: sample {key!r} has two images")
                    images[key] = (member.offset_data, member.size)
                elif extension in _LABEL_EXTENSIONS:
                    labels[key] = _label(tar, member, shard.name)
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{shard.name}: not a readable tar file ({error})") from error
    _check_end(shard, end)
    if not images:
        raise DataError(f"{shard.name}: no image in it ({', '.join(IMAGE_EXTENSIONS)})")
    for key, (offset, length) in images.items():
        if offset + length > shard.size:
            raise DataError(f"{shard.name} is cut short inside sample {key!r}")
    return [(key, *place, labels.get(key, -1)) for key, place in images.items()]


def _check_end(shard: _Shard, end: int) -> None:
    """A tar file ends in blocks of zeros; ``tarfile`` also stops, in silence, at damage."""
    count = max(0, min(_TAR_BLOCK, shard.size - end))
    if shard.read(end, count) != bytes(_TAR_BLOCK):
        raise DataError(
            f"{shard.name}: damaged or cut short at byte {end:,}, where neither a member nor the"
            " end of the archive stands; fetch it again"
        )


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    file = tar.extractfile(member)
    text = file.read(32) if file and member.size <= 32 else b""
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise DataError(f"{path}: {member.name} is not a class number")
    return int(text)


def _index_folder(folder: Path) -> ImageDataset:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    names = [name for name in names if not _is_hidden(name)]
    if not names:
        raise DataError(f"{folder} has no class folders")
    classes: list[str] = []
    paths: list[str] = []
    rows: list[_Row] = []
    for name in names:
        before = len(paths)
        for path in sorted((folder / name).rglob("*")):
            key = path.relative_to(folder)
            if _is_image(key.parts) and path.is_file():
                rows.append((key.as_posix(), len(paths), 0, path.stat().st_size, len(classes)))
                paths.append(str(path))
        if len(paths) > before:
            classes.append(name)
    # Folders come sorted by class, and a block of a cache is read as it was written: without
    # this order, fixed by the keys alone, every block would hold one class.
    return _dataset(str(folder), paths, _mixed(rows, str(folder)), tuple(classes))


def _index_remote_folder(storage: Storage, split: str, files: Sequence[StoredFile]) -> ImageDataset:
    place, parts = storage.locate(split), [file.path.split("/") for file in files]
    if not any(len(path) > 2 and not _is_hidden(path[1]) for path in parts):
        raise DataError(f"{place} has no class folders")
    images = [(file, path) for file, path in zip(files, parts, strict=True) if _is_image(path[1:])]
    classes = sorted({path[1] for _, path in images})
    label_of = {name: label for label, name in enumerate(classes)}
    rows = [
        ("/".join(path[1:]), number, 0, file.size, label_of[path[1]])
        for number, (file, path) in enumerate(images)
    ]
    found = _dataset(place, [f.path for f, _ in images], _mixed(rows, place), tuple(classes))
    return replace(found, storage=storage, versions=tuple(file.version for file, _ in images))


def _is_hidden(name: str) -> bool:
    """Such as ``.ipynb_checkpoints``, and the ``._cat.jpg`` that macOS leaves beside images."""
    return name.startswith(".")


def _is_image(parts: Sequence[str]) -> bool:
    """Whether a file of ``train/``, by its path in there, is an image of a class.

    A folder without any is no class: timm numbers none, torchvision refuses it, and the labels
    after it would be one off the teacher's head.
    """
    return (
        len(parts) > 1
        and not any(_is_hidden(part) for part in parts)
        and PurePosixPath(parts[-1]).suffix[1:].lower() in IMAGE_EXTENSIONS
    )


def _mixed(rows: list[_Row], place: str) -> list[_Row]:
    """An order fixed by the keys alone.

    Folders come sorted by class, and a block of a cache is read as it was written: without this,
    every block would hold one class.
    """
    return sorted(rows, key=lambda row: xxhash.xxh3_128_digest(_key_bytes(row[0], place)))


def _class_names(storage: Storage) -> tuple[str, ...] | None:
    for name in _CLASS_FILES:
        try:
            content = storage.read(name, max_bytes=_MAX_CLASS_FILE_BYTES)
        except NotStored:
            continue
        try:
            return tuple(content.decode().splitlines())
        except UnicodeDecodeError as error:
            where = storage.locate(name)
            raise DataError(f"{where}: class names are not UTF-8 ({error})") from error
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
