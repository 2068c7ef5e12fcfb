"""Opening an image set: its form is recognised by its files."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from scalekd.errors import DataError, UsageError
from scalekd.images.folders import FolderImages, has_class_folders
from scalekd.images.hugging_face import PREFIX, open_hub, open_parquet, open_saved
from scalekd.images.labels import LabelReader
from scalekd.images.left_out import listed
from scalekd.images.samples import IMAGE_EXTENSIONS, ImageDataset
from scalekd.images.tars import TarImages
from scalekd.options import ImageOptions
from scalekd.storage import (
    LinkedStorage,
    LocalCache,
    Storage,
    StoredFile,
    is_remote,
    open_storage,
)
from scalekd.storage.in_flight import submit
from scalekd.text import MAX_CELL, printable

_TRAIN_NAMES = ("train", "training", "train_images", "images")
_TEST_NAMES = ("val", "valid", "validation", "dev", "test", "testing", "eval")
_SPLIT_NAMES = {"train": _TRAIN_NAMES, **dict.fromkeys(_TEST_NAMES, _TEST_NAMES)}
"""Names that data sets give to the folder of a split, by the name that was asked for."""

_TRAIN_TABLE = re.compile(r"(?<![a-z])train(ing|set)?(?![a-z])", re.IGNORECASE)
_OTHER_TABLE = re.compile(rf"(?<![a-z])({'|'.join(_TEST_NAMES)})(set|s)?(?![a-z])", re.IGNORECASE)


def open_dataset(
    data_dir: str,
    split: str = "train",
    *,
    local_cache: LocalCache | None = None,
    options: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
) -> ImageDataset:
    """Index an image set.

    Args:
        data_dir: A folder or URL, a glob or brace pattern of ``.tar`` or ``.parquet`` files, or
            ``hfds/NAME`` for a data set of the Hugging Face Hub.
        split: ``train`` takes ``DIR/train-*.tar``, ``train-*.parquet`` or the folder
            ``DIR/train/``; a pattern such as ``train-{000000..000009}.tar`` is taken below
            ``data_dir``. Sub-folders with images are classes, numbered in order of name. A folder
            with images and without sub-folders has images without labels, and may also be
            ``data_dir`` itself.
        local_cache: Keeps the shards of a remote set.
        options: How images, labels and keys are chosen.

    Raises:
        DataError: The set does not exist or has no image; a shard or label is damaged; a key
            occurs twice.
        UsageError: The options do not fit the image set.
    """
    return recognise(data_dir, split, local_cache=local_cache, options=options)()


def recognise(
    data_dir: str,
    split: str,
    *,
    local_cache: LocalCache | None = None,
    options: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
) -> Callable[[], ImageDataset]:
    """Find the source that reads an image set, from the names of its files.

    Args:
        data_dir: As for :func:`open_dataset`.
        split: As for :func:`open_dataset`.
        local_cache: As for :func:`open_dataset`.
        options: As for :func:`open_dataset`.

    Returns:
        A function that indexes the image set, which may take long.

    Raises:
        DataError: The set does not exist, or has no split of this name.
        UsageError: The options do not fit the image set.
    """
    if data_dir.startswith(PREFIX):
        return partial(open_hub, data_dir.removeprefix(PREFIX), split, options)
    location, pattern = check_location(data_dir)
    root = None if is_remote(location) else Path(location)
    storage = LinkedStorage(root) if root else open_storage(location, local_cache=local_cache)
    if pattern is None and _is_pattern(split):
        pattern = split
    if pattern is not None:
        shards = data_dir if pattern != split else storage.locate(pattern)
        return lambda: _open_files(storage, root, _matching(storage, pattern), shards, options)
    split = split.strip("/").removeprefix("./")
    parent, _, name = split.rpartition("/")
    try:
        folders, files = storage.folders(parent), storage.files(parent)
    except UsageError as error:
        raise UsageError(
            f"{error}: name the shards, as in --split '{split}-{{000000..000009}}.tar'"
        ) from None
    tars = [file for file in files if fnmatch.fnmatchcase(_base(file), f"{name}-*.tar")]
    if tars:
        location = storage.locate(f"{split}-*.tar")
        return partial(_open_files, storage, root, tars, location, options)
    saved = None if root is None else _saved(root, split)
    if saved is not None:
        return partial(open_saved, saved, options)
    tables = _tables(storage, split, folders, files)
    if tables:
        location = f"{storage.location}, split {split}"
        return partial(_open_files, storage, root, tables, location, options)
    for option in ("input_key", "target_key", "key_column"):
        if getattr(options, option) is not None:
            raise UsageError(
                f"--{option.replace('_', '-')}: {storage.location} has neither shards nor tables"
                f" for the split {split}, so there is nothing to choose; leave the option out"
            )
    labelled = options.labels == "auto"
    if split == "." or name in folders:
        folder = "" if split == "." else split
        return partial(FolderImages.open, storage, folder, labelled=labelled)
    if split == "train" and (
        not labelled or (_has_images(files) and not has_class_folders(storage, ""))
    ):
        return partial(FolderImages.open, storage, "", labelled=labelled)
    raise DataError(_nothing_there(storage, split, folders, files))


def check_location(data_dir: str) -> tuple[str, str | None]:
    """Return the folder or URL of an image set, and the pattern that ``data_dir`` ends with.

    Raises:
        DataError: It is a local folder that does not exist.
        UsageError: It is a URL whose host is a pattern.
    """
    if data_dir.startswith(PREFIX):
        return data_dir, None
    location, pattern = _location_and_pattern(data_dir)
    if not is_remote(location) and not Path(location).is_dir():
        raise DataError(f"no data at {data_dir}: there is no such folder")
    return location, pattern


def _open_files(
    storage: Storage,
    root: Path | None,
    files: Sequence[StoredFile],
    location: str,
    options: ImageOptions,
) -> ImageDataset:
    """Open shards or tables."""
    if not files[0].path.endswith(".parquet"):
        if options.key_column is not None:
            raise UsageError(f"--key-column: {location} are shards, whose keys are members' names")
        labels = LabelReader(options.target_key, labelled=options.labels == "auto")
        return TarImages.open(storage, files, location, labels=labels, input_key=options.input_key)
    if root is None:
        raise UsageError(
            f"{location}: tables are read from a local folder or, with --data-dir hfds/NAME, from"
            " the Hugging Face Hub; fetch them first, or convert them to tars"
        )
    return open_parquet([root / file.path for file in files], location, options)


def _saved(root: Path, split: str) -> Path | None:
    """Return the folder of a split that ``save_to_disk`` wrote, or ``None``."""
    if (root / split / "state.json").is_file():
        return root / split
    if (root / "dataset_dict.json").is_file():
        names = listed(sorted(state.parent.name for state in root.glob("*/state.json")))
        raise DataError(f"{root}: has no split {split} (splits: {names})")
    if split in ("train", ".") and (root / "state.json").is_file():
        return root
    return None


def _tables(
    storage: Storage, split: str, folders: Sequence[str], files: Sequence[StoredFile]
) -> list[StoredFile]:
    """Return the parquet files of a split, named as the Hub names them.

    Tables beside images, such as a ``metadata.parquet``, are not taken.
    """
    parent, _, name = split.rpartition("/")

    def of_split(candidates: Sequence[StoredFile]) -> list[StoredFile]:
        pattern = rf"{re.escape(name)}(-.*)?\.parquet"
        return [file for file in candidates if re.fullmatch(pattern, _base(file))]

    matching = of_split(files)
    if not matching and name in folders:
        below = storage.files(split)
        nested = [folder for folder in storage.folders(split) if not folder.startswith(".")]
        if not nested and not _has_images(below):
            matching = [file for file in below if file.path.endswith(".parquet")]
    if not matching and not parent and "data" in folders:
        matching = of_split(storage.files("data"))
    if not matching and split == "train" and name not in folders and not _has_images(files):
        tables = [file for file in files if file.path.endswith(".parquet")]
        own = [file for file in tables if _TRAIN_TABLE.search(_base(file))]
        matching = own or [file for file in tables if not _OTHER_TABLE.search(_base(file))]
    return matching


def _has_images(files: Sequence[StoredFile]) -> bool:
    return any(_base(file).rpartition(".")[2].lower() in IMAGE_EXTENSIONS for file in files)


def _nothing_there(
    storage: Storage, split: str, folders: Sequence[str], files: Sequence[StoredFile]
) -> str:
    names = sorted([*folders, *map(_base, files)])
    if not names:
        return f"{storage.location} has neither {split}-*.tar nor a folder {split}/ (it is empty)"
    advice = "".join(f"; {way}" for way in _ways_out(split, folders, [_base(f) for f in files]))
    return (
        f"{storage.location} has neither {split}-*.tar nor a folder {split}/ (it has"
        f" {listed(names)}){advice}"
    )


def _ways_out(split: str, folders: Sequence[str], files: Sequence[str]) -> Iterator[str]:
    """Yield the options that would take what a folder contains."""
    option = "--split" if split == "train" else "--val-split or --split"
    shards = [name for name in files if name.endswith((".tar", ".parquet"))]
    patterns = sorted({re.sub(r"\d{2,}|\d(?=\.\w+$)", "*", name) for name in shards})
    if patterns:
        named = [pattern for pattern in patterns if split in pattern] or patterns
        example = printable(named[0], limit=MAX_CELL)
        yield f"{option} '{example}' takes files by pattern"
    meant = _SPLIT_NAMES.get(split, ())
    if same := [name for name in folders if name.lower() in meant]:
        yield f"{option} {printable(same[0], limit=MAX_CELL)} takes that folder"
    if split == "train" and folders:
        yield "--split . takes its own folders as classes"
        yield "--labels none takes all images below it as unlabelled"


def _location_and_pattern(data_dir: str) -> tuple[str, str | None]:
    """Return a folder or URL, and the pattern of shards that ``data_dir`` may end with."""
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


def _is_glob(text: str) -> bool:
    return any(character in text for character in "*?[{")


def _is_pattern(text: str) -> bool:
    return _is_glob(text) or text.endswith((".tar", ".parquet"))


def _matching(storage: Storage, pattern: str) -> list[StoredFile]:
    """Return the files of a glob or brace pattern; only a glob needs the store to list them."""
    from webdataset.shardlists import expand_urls  # loads torch

    files: list[StoredFile] = []
    names = expand_urls(pattern)
    ask = partial(_globbed, storage)
    answers: Iterable[list[StoredFile]] = map(ask, names)
    if storage.is_remote:
        requests = [submit(ask, name) for name in names]
        answers = (request.result() for request in requests)
    for name, matching in zip(names, answers, strict=True):
        if not matching:
            raise DataError(f"no file matches {storage.locate(name)}")
        files.extend(matching)
    return files


def _globbed(storage: Storage, pattern: str) -> list[StoredFile]:
    """Return the files whose parts match those of a pattern, one folder after another."""
    if not _is_glob(pattern):
        return list(filter(None, [storage.describe(pattern)]))
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
