"""Rows of a Hugging Face data set: from the Hub, of parquet files, or as ``save_to_disk`` writes.

The library `datasets` reads them as memory-mapped Arrow tables; it runs no script of a data set
and unpickles nothing. Images are taken as the encoded bytes of a column and not decoded.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from scalekd.errors import DataError, EnvironmentFault, ScaleKDError, UsageError
from scalekd.images.labels import Label, numbered
from scalekd.images.left_out import LeftOut, listed, shown
from scalekd.images.samples import (
    ImageDataset,
    Rows,
    check_not_empty,
    check_sizes,
    encoded_keys,
)
from scalekd.text import one_line, printable

PREFIX = "hfds/"
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "cls")
_ROWS_AT_ONCE = 1000
_MAX_STATE_BYTES = 16 << 20
_MAX_LABEL = 10**9


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read, as given on the command line; ``None`` finds them.

    Attributes:
        image: Column of the encoded images.
        label: Column of the labels.
        key: Column of the keys, or a field of one (``image/path``).
        labelled: Otherwise no label is read.
    """

    image: str | None = None
    label: str | None = None
    key: str | None = None
    labelled: bool = True


@dataclass(frozen=True, kw_only=True)
class HuggingFaceImages(ImageDataset):
    """Images of a table, one row a sample.

    The key is what :attr:`Columns.key` names, or else the name of the file and the number of the
    row in it, which change when the rows are distributed over other files.

    Attributes:
        table: ``datasets.Dataset`` of the image column alone, in Arrow's format.
        rows: Row of each sample.
    """

    table: Any
    rows: Rows

    _columns: ClassVar[tuple[str, ...]] = (*ImageDataset._columns, "rows")

    @property
    def is_remote(self) -> bool:
        return False

    def stored_order(self) -> Self:
        """The same samples in the order of the rows."""
        return self.taken(np.argsort(self.rows))

    def read_images(self, positions: Sequence[int]) -> Iterator[bytes]:
        """Read encoded images in the order given.

        Raises:
            DataError: A file of the table was moved or cut.
        """
        rows = [int(self.rows[position]) for position in positions]
        with _explained(self.place):
            images = self.table[rows].column(0).to_pylist()
        for image in images:
            data: bytes | None = image["bytes"]
            yield data if data is not None else _file(image["path"]).read_bytes()

    @classmethod
    def of(cls, table: Any, names: Sequence[str] | None, place: str, columns: Columns) -> Self:
        """Index a table.

        Args:
            table: ``datasets.Dataset``.
            names: Key of each row where no column of keys is given; its number when ``None``.
            place: What was opened, for messages.
            columns: Which columns are read.

        Raises:
            UsageError: There is no such column, or several could be meant.
            DataError: There is no image, or a label or key cannot be read.
        """
        library = _library()
        image = _image_column(table, columns, place)
        images = table.select_columns([image]).cast_column(image, library.Image(decode=False))
        images = images.with_format("arrow")
        left_out, notes = LeftOut(), []
        with _explained(place):
            sizes = _sizes(images, image, left_out)
            rows = np.flatnonzero(sizes >= 0)
            keys = _keys(table, names, rows, place, columns)
            labels, class_names, about_labels = _labels(table, image, rows, keys, place, columns)
        notes = [*left_out.lines(place), *about_labels]
        check_not_empty(len(rows), place, notes)
        check_sizes(sizes[rows], keys, place)
        dataset = cls(
            place=place,
            keys=encoded_keys(keys, place),
            labels=labels,
            sizes=sizes[rows],
            class_names=class_names,
            notes=tuple(notes),
            table=images,
            rows=rows,
        )
        return dataset.mixed_unless_shuffled()


def open_hub(name: str, split: str, columns: Columns) -> HuggingFaceImages:
    """Open ``NAME`` or ``NAME:CONFIGURATION`` of the Hub, or of what was fetched from there before.

    Raises:
        DataError: There is no such data set, configuration or split.
        EnvironmentFault: The Hub cannot be reached.
    """
    library, place = _library(), f"{PREFIX}{name}"
    repository, _, configuration = name.partition(":")
    if Path(repository).exists():
        raise UsageError(
            f"{place}: {repository} is a folder of this machine; pass it as --data-dir without"
            f" {PREFIX}"
        )
    with _explained(place):
        table = library.load_dataset(repository, configuration or None, split=split)
    return HuggingFaceImages.of(table, None, f"{place}, split {split}", columns)


def open_parquet(files: Sequence[Path], place: str, columns: Columns) -> HuggingFaceImages:
    """Open parquet files. ``datasets`` keeps an uncompressed copy in its cache folder.

    Raises:
        DataError: A file is damaged.
    """
    library = _library()
    from pyarrow.parquet import read_metadata

    names: list[str] = []
    with _explained(place):
        for file in files:
            count = read_metadata(file).num_rows
            if count > file.stat().st_size:  # names are made before the file is read
                raise DataError(f"{file}: states {count:,} rows, more than it has bytes")
            names += [f"{file.stem}/{row:08d}" for row in range(count)]
        table = library.load_dataset(
            "parquet", data_files={"train": [str(file) for file in files]}, split="train"
        )
    return HuggingFaceImages.of(table, names, place, columns)


def open_saved(folder: Path, columns: Columns) -> HuggingFaceImages:
    """Open one split as ``save_to_disk`` wrote it.

    Raises:
        DataError: It is damaged, or names files outside the folder.
    """
    state = folder / "state.json"
    try:
        for document in (state, folder / "dataset_info.json"):
            if document.stat().st_size > _MAX_STATE_BYTES:
                raise DataError(f"{document}: has more than {_MAX_STATE_BYTES:,} bytes")
        files = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{state}: does not list the files of a saved data set") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise DataError(f"{state}: {shown(str(name))} is not the name of a file beside it")
    with _explained(str(folder)):
        table = _library().Dataset.load_from_disk(str(folder))
    return HuggingFaceImages.of(table, None, str(folder), columns)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "Hugging Face data sets need the package datasets: pip install 'scalekd[hf]'"
        ) from None
    return datasets


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turn what `datasets` raises into one line."""
    try:
        yield
    except ScaleKDError:
        raise
    except Exception as error:  # DatasetsError, Arrow's, HTTP clients' and built-in ones
        cause = error.__cause__ or error
        text = one_line(cause, limit=300)
        if isinstance(error, ConnectionError) or "offline" in text.lower():
            raise EnvironmentFault(
                f"{place}: the Hugging Face Hub cannot be reached ({text}); check the network and"
                " HF_HUB_OFFLINE"
            ) from error
        raise DataError(f"{place}: {type(cause).__name__}: {text}") from error


def _image_column(table: Any, columns: Columns, place: str) -> str:
    """The column of encoded images."""
    features = table.features
    if columns.image is not None:
        if columns.image not in features:
            raise UsageError(
                f"--input-key {columns.image}: {place} has no such column (columns:"
                f" {listed(features)})"
            )
        if not _holds_images(features[columns.image]):
            raise UsageError(
                f"--input-key {columns.image}: that column of {place} holds"
                f" {printable(features[columns.image], limit=80)}, not encoded images"
            )
        return columns.image
    library = _library()
    typed = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    usual = [n for n in _IMAGE_COLUMNS if n in features and _holds_images(features[n])]
    found = typed or usual
    for name in _IMAGE_COLUMNS:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    what = f"several image columns ({listed(found)})" if found else "no image column"
    raise UsageError(
        f"{place}: has {what}; name the one with the encoded images with --input-key (columns:"
        f" {listed(features, 20)})"
    )


def _holds_images(feature: Any) -> bool:
    """Whether a column holds encoded images: typed so, raw bytes, or bytes with a path."""
    library = _library()
    if isinstance(feature, library.Image):
        return True
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _sizes(images: Any, column: str, left_out: LeftOut) -> Rows:
    """Bytes of each row's image, -1 where there is none."""
    import pyarrow.compute as arrow

    sizes = np.full(len(images), -1, np.int64)
    start = 0
    for batch in images.iter(batch_size=_ROWS_AT_ONCE):
        values = batch.column(column)
        lengths = arrow.binary_length(arrow.struct_field(values, "bytes")).to_pylist()
        for row, length in enumerate(lengths, start):
            if length:
                sizes[row] = length
                continue
            path = values[row - start].as_py()
            path = path and path.get("path")
            if path and length is None:
                sizes[row] = _file(path).stat().st_size
            else:
                left_out.add("rows without an image", f"row {row:,}")
        start += len(lengths)
    return sizes


def _file(path: str) -> Path:
    """A file that `datasets` fetched; a table may not name others of this machine."""
    from huggingface_hub import constants

    config = _library().config
    file = Path(path).resolve()
    fetched = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    if not any(file.is_relative_to(Path(folder).resolve()) for folder in fetched):
        raise DataError(
            f"a row holds the path {shown(path)} and not the bytes of an image; write the data set"
            " with its images embedded"
        )
    return file


def _keys(
    table: Any, names: Sequence[str] | None, rows: Rows, place: str, columns: Columns
) -> list[str]:
    if columns.key is None:
        return [names[row] if names is not None else f"{row:09d}" for row in rows.tolist()]
    values = _values(table, columns.key, "--key-column", place)
    keys: list[str] = []
    for row in rows.tolist():
        value = values[row]
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(
                f"--key-column {columns.key}: row {row:,} of {place} holds {shown(str(value))};"
                " keys are texts or whole numbers"
            )
        keys.append(str(value))
    return keys


def _values(table: Any, path: str, option: str, place: str) -> list[Any]:
    """Values of a column, or of a field of one with ``/`` between the names, as in timm."""
    name, *fields = [path] if path in table.features else path.split("/")
    if name not in table.features:
        raise UsageError(
            f"{option} {path}: {place} has no such column (columns: {listed(table.features, 20)})"
        )
    column = table.select_columns([name])
    if fields and isinstance(table.features[name], _library().Image):
        column = column.cast_column(name, _library().Image(decode=False))
    import pyarrow.compute as arrow

    found: list[Any] = []
    for batch in column.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        values = batch.column(name)
        for part in fields:
            values = arrow.struct_field(values, part)
        found += values.to_pylist()
    return found


def _labels(
    table: Any, image: str, rows: Rows, keys: Sequence[str], place: str, columns: Columns
) -> tuple[Rows, tuple[str, ...] | None, tuple[str, ...]]:
    """Labels, class names, and notes about them."""
    if not columns.labelled:
        return np.full(len(rows), -1, np.int32), None, ()
    column = columns.label or _label_column(table, image, place)
    if column is None:
        return (
            np.full(len(rows), -1, np.int32),
            None,
            (
                f"{place}: has no column of labels (columns: {listed(table.features, 20)}), so its"
                " images have none; name the column with --target-key, or pass --labels none",
            ),
        )
    feature = table.features.get(column)
    class_names = getattr(feature, "names", None)
    values = _values(table, column, "--target-key", place)
    labels: list[Label] = []
    for row in rows.tolist():
        value = values[row]
        is_number = isinstance(value, int) and -1 <= value < _MAX_LABEL
        if not (is_number or isinstance(value, str | None)):
            raise DataError(
                f"--target-key {column}: row {row:,} of {place} holds {shown(str(value))}; labels"
                " are class numbers or class names"
            )
        labels.append(value)
    found = numbered(labels, None if class_names is None else tuple(class_names), keys, place)
    return found.numbers, found.class_names, found.notes


def _label_column(table: Any, image: str, place: str) -> str | None:
    for name in _LABEL_COLUMNS:
        if name in table.features:
            return name
    classes = _library().ClassLabel
    found = [
        name
        for name, feature in table.features.items()
        if name != image and isinstance(feature, classes)
    ]
    if len(found) > 1:
        raise UsageError(
            f"{place}: has several columns of classes ({listed(found)}); choose one with"
            " --target-key, or pass --labels none"
        )
    return found[0] if found else None
