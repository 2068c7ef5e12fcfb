"""Folders of images: one sub-folder a class, or images without labels."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Self

import numpy as np

from scalekd.errors import DataError
from scalekd.images.left_out import LeftOut, shown
from scalekd.images.order import mixed
from scalekd.images.samples import IMAGE_EXTENSIONS, check_not_empty, encoded_keys
from scalekd.images.stored import StoredImages
from scalekd.storage import Storage, StoredFile
from scalekd.text import printable


@dataclass(frozen=True, kw_only=True)
class FolderImages(StoredImages):
    """Images of a folder; the key is the path below it.

    Folders come sorted by class, so the samples are ordered by a hash of their keys.
    """

    @classmethod
    def open(cls, storage: Storage, folder: str, *, labelled: bool) -> Self:
        """List the images below a folder.

        Args:
            storage: Storage that contains the folder.
            folder: Path of the folder in the storage; ``""`` for all of it.
            labelled: Whether sub-folders are classes, numbered in order of name. Images above
                them are then left out, unless there are no classes at all.

        Raises:
            DataError: There is no image, or a class folder has files and no image.
        """
        location = storage.locate(folder) if folder else storage.location
        images, left_out, others = _listed(storage, folder)
        notes: list[str] = []
        classes: tuple[str, ...] | None = None
        if labelled and any("/" in path for path in images):
            classes = tuple(sorted({path.split("/")[0] for path in images if "/" in path}))
            _check_classes(others, set(classes), location)
            for name in storage.folders(folder):
                if name not in classes and not _is_hidden(name):
                    left_out.add("class folders without files", name)
            for path in [path for path in images if "/" not in path]:
                left_out.add("images outside the class folders", path)
                del images[path]
        elif labelled:
            _check_classes(others, set(), location)
            if images:
                notes.append(
                    f"{printable(location)}: has images and no class folders, so its"
                    f" {len(images):,} images have no labels (--labels none)"
                )
        notes += left_out.lines(location)
        check_not_empty(len(images), location, notes)
        keys, files = list(images), list(images.values())
        number_of = {name: number for number, name in enumerate(classes or ())}
        labels = [-1 if classes is None else number_of[key.split("/")[0]] for key in keys]
        dataset = cls(
            location=location,
            keys=encoded_keys(keys, location),
            labels=np.array(labels, np.int32),
            sizes=np.array([file.size for file in files], np.int64),
            class_names=classes,
            notes=tuple(notes),
            storage=storage,
            files=tuple(file.path for file in files),
            versions=tuple(file.version for file in files) if storage.is_remote else (),
            file_numbers=np.arange(len(files), dtype=np.int32),
            offsets=np.zeros(len(files), np.int64),
        )
        return dataset.taken(mixed(dataset.keys))


def has_class_folders(storage: Storage, folder: str) -> bool:
    """Return whether a folder has images in sub-folders."""
    return any("/" in path for path in _listed(storage, folder)[0])


def _listed(
    storage: Storage, folder: str
) -> tuple[dict[str, StoredFile], LeftOut, dict[str, list[str]]]:
    """List images by path below the folder, files left out, and other files of each sub-folder."""
    listing, start = storage.listing(folder), len(folder) + 1 if folder else 0
    images: dict[str, StoredFile] = {}
    left_out = LeftOut()
    others: dict[str, list[str]] = {}
    for file in sorted(listing.files, key=lambda file: file.path):
        path = file.path[start:]
        parts = path.split("/")
        if any(_is_hidden(part) for part in parts):
            left_out.add("hidden files", path)
        elif PurePosixPath(parts[-1]).suffix[1:].lower() in IMAGE_EXTENSIONS:
            images[path] = file
        else:
            left_out.add("files that are no images by their extension", path)
            others.setdefault("/".join(parts[:1]) if len(parts) > 1 else "", []).append(path)
    for reason, path in listing.skipped:
        left_out.add(reason, path[start:])
        top, below, _ = path[start:].partition("/")
        if below and not _is_hidden(top):
            others.setdefault(top, []).append(path[start:])
    return images, left_out, others


def _check_classes(others: dict[str, list[str]], classes: set[str], location: str) -> None:
    """Refuse class folders without images: leaving one out would shift later class numbers."""
    empty = sorted(name for name in others if name and name not in classes)
    if empty:
        paths = others[empty[0]]
        raise DataError(
            f"{location}: the class folder {shown(empty[0])} has no image that can be read, only"
            f" {len(paths):,} other files such as {shown(paths[0])} (read are"
            f" {', '.join(IMAGE_EXTENSIONS)}); convert them, move the folder elsewhere,"
            " or take all images without labels by --labels none"
        )


def _is_hidden(name: str) -> bool:
    """Return whether a name is hidden, such as the ``._cat.jpg`` that macOS writes."""
    return name.startswith(".")
