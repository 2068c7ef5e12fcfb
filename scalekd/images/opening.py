"""Opening an image set: which form it has, by what lies where it is."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import webdataset.shardlists

from scalekd.errors import DataError, UsageError
from scalekd.images.folders import FolderImages
from scalekd.images.labels import LabelReader
from scalekd.images.left_out import listed
from scalekd.images.samples import IMAGE_EXTENSIONS, ImageDataset
from scalekd.images.tars import TarImages
from scalekd.storage import (
    LinkedStorage,
    LocalCache,
    Storage,
    StoredFile,
    is_remote,
    open_storage,
)
from scalekd.storage.in_flight import submit

LabelMode = Literal["auto", "none"]


def open_dataset(
    data_dir: str,
    split: str = "train",
    *,
    local_cache: LocalCache | None = None,
    labels: LabelMode = "auto",
    input_key: str | None = None,
    target_key: str | None = None,
) -> ImageDataset:
    """Index an image set.

    Args:
        data_dir: A folder or URL, or a glob or brace pattern of ``.tar`` files.
        split: ``train`` takes ``DIR/train-*.tar`` or the folder ``DIR/train/``; a pattern such as
            ``train-{000000..000009}.tar`` is taken below ``data_dir``. Sub-folders with images are
            classes, numbered in order of name. A folder with images and without sub-folders has
            images without labels, and may also be ``data_dir`` itself.
        local_cache: Keeps the shards of a remote set.
        labels: ``none`` ignores all labels and takes every image at any depth.
        input_key: Extension of the images in shards; see :meth:`TarImages.open`.
        target_key: Where labels are in shards; see :class:`LabelReader`.

    Raises:
        DataError: There is nothing there, or no image; a shard or label is damaged; a key occurs
            twice.
        UsageError: The options do not fit the image set.
    """
    location, pattern = _location_and_pattern(data_dir)
    storage = _storage(location, local_cache)
    reader = LabelReader(target_key, labelled=labels == "auto")
    if pattern is None and _is_pattern(split):
        pattern = split
    if pattern is not None:
        place = data_dir if pattern != split else storage.locate(pattern)
        found = _matching(storage, pattern)
        return TarImages.open(storage, found, place, labels=reader, input_key=input_key)
    split = split.strip("/").removeprefix("./")
    if isinstance(storage, LinkedStorage) and not storage.root.is_dir():
        raise DataError(f"no data at {data_dir}: there is no such folder")
    parent, _, name = split.rpartition("/")
    try:
        folders, files = storage.folders(parent), storage.files(parent)
    except UsageError as error:
        raise UsageError(
            f"{error}: name the shards, as in --split '{split}-{{000000..000009}}.tar'"
        ) from None
    tars = [file for file in files if fnmatch.fnmatchcase(_base(file), f"{name}-*.tar")]
    if tars:
        place = storage.locate(f"{split}-*.tar")
        return TarImages.open(storage, tars, place, labels=reader, input_key=input_key)
    for option, value in (("--input-key", input_key), ("--target-key", target_key)):
        if value is not None:
            raise UsageError(f"{option}: {data_dir} has no shards or tables with members to choose")
    if split == ".":
        return FolderImages.open(storage, "", labelled=labels == "auto")
    if name in folders:
        return FolderImages.open(storage, split, labelled=labels == "auto")
    if split == "train":
        if labels == "none":
            return FolderImages.open(storage, "", labelled=False)
        if any(_is_image(file) for file in files) and not folders:
            return FolderImages.open(storage, "", labelled=True)
    raise DataError(_nothing_there(storage, split, folders, files))


def _nothing_there(
    storage: Storage, split: str, folders: Sequence[str], files: Sequence[StoredFile]
) -> str:
    names = sorted([*folders, *map(_base, files)])
    if not names:
        return f"{storage.place} has neither {split}-*.tar nor a folder {split}/ (it is empty)"
    advice = ""
    if split == "train":
        advice = (
            "; --split . takes its own folders as classes, --labels none all images below it as"
            " unlabelled"
        )
    return (
        f"{storage.place} has neither {split}-*.tar nor a folder {split}/ (it holds"
        f" {listed(names)}){advice}"
    )


def _location_and_pattern(data_dir: str) -> tuple[str, str | None]:
    """A folder or URL, and the pattern of shards below it that ``data_dir`` may end with."""
    if not is_remote(data_dir):
        data_dir = data_dir.removeprefix("file://")
        if Path(data_dir).is_dir():
            return data_dir, None
    if not _is_pattern(data_dir):
        return data_dir.rstrip("/"), None
    parts = data_dir.split("/")
    first = next((number for number, part in enumerate(parts) if _is_glob(part)), len(parts) - 1)
    if is_remote(data_dir) and first < 3:
        raise UsageError(f"{data_dir}: the host or bucket of a URL cannot be a pattern")
    return "/".join(parts[:first]) or ("/" if first else "."), "/".join(parts[first:])


def _storage(location: str, local_cache: LocalCache | None) -> Storage:
    if is_remote(location):
        return open_storage(location, local_cache=local_cache)
    return LinkedStorage(location)


def _is_glob(text: str) -> bool:
    return any(character in text for character in "*?[{")


def _is_pattern(text: str) -> bool:
    return _is_glob(text) or text.endswith(".tar")


def _matching(storage: Storage, pattern: str) -> list[StoredFile]:
    """Files that a glob or brace pattern names; only a glob needs the store to list them."""
    found: list[StoredFile] = []
    names = webdataset.shardlists.expand_urls(pattern)
    described = [None if _is_glob(name) else submit(storage.describe, name) for name in names]
    for name, file in zip(names, described, strict=True):
        if file is not None:
            matching = [entry for entry in (file.result(),) if entry is not None]
        else:
            matching = _globbed(storage, name)
        if not matching:
            raise DataError(f"no file matches {storage.locate(name)}")
        found.extend(matching)
    return found


def _globbed(storage: Storage, pattern: str) -> list[StoredFile]:
    """Files whose parts match those of a pattern, one folder after another."""
    *parents, last = pattern.split("/")
    folders = [""]
    for part in parents:
        folders = [
            f"{folder}/{name}" if folder else name
            for folder in folders
            for name in ([part] if not _is_glob(part) else storage.folders(folder))
            if fnmatch.fnmatchcase(name, part) or not _is_glob(part)
        ]
    return [
        file
        for folder in folders
        for file in storage.files(folder)
        if fnmatch.fnmatchcase(_base(file), last)
    ]


def _base(file: StoredFile) -> str:
    return file.path.rpartition("/")[2]


def _is_image(file: StoredFile) -> bool:
    return _base(file).rpartition(".")[2].lower() in IMAGE_EXTENSIONS
