"""Hugging Face data sets: from the Hub, from parquet files, or written by ``save_to_disk``.

The library `datasets` reads them as memory-mapped Arrow tables; it runs no script of a data set
and unpickles nothing. Images are taken as the encoded bytes of a column and not decoded.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from scalekd.errors import DataError, EnvironmentFault, ScaleKDError, UsageError
from scalekd.images.labels import NO_LABEL, Label, Labels, as_number, numbered
from scalekd.images.left_out import LeftOut, listed, shown
from scalekd.images.samples import ImageDataset, Rows, check_not_empty, encoded_keys
from scalekd.options import ImageOptions
from scalekd.text import one_line, printable

PREFIX = "hfds/"
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "cls")
_ROWS_AT_ONCE = 1000
_MAX_STATE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class HuggingFaceImages(ImageDataset):
    """Images of a table, one row a sample.

    The key is the value of the column :attr:`ImageOptions.key_column`, or else the name of the file
    and the number of the row in it, which change when the rows are distributed over other files.

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
        """Return the same samples in the order of the rows."""
        return self.taken(np.argsort(self.rows))

    def read_images(self, positions: Sequence[int]) -> Iterator[bytes]:
        """Read encoded images in the order given.

        Raises:
            DataError: A file of the table was moved or cut.
        """
        rows = [int(self.rows[position]) for position in positions]
        with _explained(self.location):
            images = self.table[rows].column(0).to_pylist()
        for image in images:
            data: bytes | None = image["bytes"]
            yield data if data is not None else _file(image["path"]).read_bytes()

    @classmethod
    def of(
        cls, table: Any, names: Sequence[str] | None, location: str, options: ImageOptions
    ) -> Self:
        """Index a table.

        Args:
            table: ``datasets.Dataset``.
            names: Key of each row if no column of keys is given; ``None`` uses the row number.
            location: Path or name that was opened, for messages.
            options: Columns to read; those that are not named are recognised.

        Raises:
            UsageError: A column does not exist, or several columns could be meant.
            DataError: The table has no image, or a label or key cannot be read.
        """
        check_not_empty(len(table), location)
        library = _library()
        image = _image_column(table, options, location)
        images = table.select_columns([image]).cast_column(image, library.Image(decode=False))
        images = images.with_format("arrow")
        left_out = LeftOut()
        with _explained(location):
            sizes = _sizes(images, image, left_out)
            rows = np.flatnonzero(sizes >= 0)
            keys = _keys(table, names, rows, location, options)
            labels = _labels(table, image, rows, keys, location, options)
        notes = (*left_out.lines(location), *labels.notes)
        check_not_empty(len(rows), location, notes)
        dataset = cls(
            location=location,
            keys=encoded_keys(keys, location),
            labels=labels.numbers,
            sizes=sizes[rows],
            class_names=labels.class_names,
            notes=notes,
            table=images,
            rows=rows,
        )
        return dataset.mixed_unless_shuffled()


def open_hub(name: str, split: str, options: ImageOptions) -> HuggingFaceImages:
    """Open ``NAME`` or ``NAME:CONFIGURATION`` of the Hub, or its downloaded copy.

    Raises:
        DataError: There is no such data set, configuration or split.
        EnvironmentFault: The Hub cannot be reached.
    """
    library, location = _library(), f"{PREFIX}{name}"
    repository, _, configuration = name.partition(":")
    if Path(repository).exists():
        raise UsageError(
            f"{location}: {repository} is a folder of this machine; pass it as --data-dir without"
            f" {PREFIX}"
        )
    with _explained(location):
        table = library.load_dataset(repository, configuration or None, split=split)
    return HuggingFaceImages.of(table, None, f"{location}, split {split}", options)


def open_parquet(files: Sequence[Path], location: str, options: ImageOptions) -> HuggingFaceImages:
    """Open parquet files. ``datasets`` keeps an uncompressed copy in its cache folder.

    Raises:
        DataError: A file is damaged.
    """
    library = _library()
    from pyarrow.parquet import read_metadata

    names: list[str] = []
    with _explained(location):
        for file in files:
            count = read_metadata(file).num_rows
            if count > file.stat().st_size:  # names are made before the file is read
                raise DataError(f"{file}: states {count:,} rows, more than it has bytes")
            names += [f"{file.stem}/{row:08d}" for row in range(count)]
        check_not_empty(len(names), location)  # `datasets` would not say what is missing
        table = library.load_dataset(
            "parquet", data_files={"train": [str(file) for file in files]}, split="train"
        )
    return HuggingFaceImages.of(table, names, location, options)


def open_saved(folder: Path, options: ImageOptions) -> HuggingFaceImages:
    """Open one split as ``save_to_disk`` wrote it.

    Raises:
        DataError: The split is damaged, or names files outside the folder.
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
    check_not_empty(len(files), str(folder))
    with _explained(str(folder)):
        table = _library().Dataset.load_from_disk(str(folder))
    return HuggingFaceImages.of(table, None, str(folder), options)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "Hugging Face data sets need the package datasets: pip install 'scalekd[hf]'"
        ) from None
    return datasets


@contextlib.contextmanager
def _explained(location: str) -> Iterator[None]:
    """Convert exceptions of `datasets` into errors of one line."""
    try:
        yield
    except ScaleKDError:
        raise
    except Exception as error:  # DatasetsError, Arrow's, HTTP clients' and built-in ones
        cause = error.__cause__ or error
        text = one_line(cause, limit=300)
        if isinstance(error, ConnectionError) or "offline" in text.lower():
            raise EnvironmentFault(
                f"{location}: the Hugging Face Hub cannot be reached ({text}); check the network"
                " and HF_HUB_OFFLINE"
            ) from error
        raise DataError(f"{location}: {type(cause).__name__}: {text}") from error


def _image_column(table: Any, options: ImageOptions, location: str) -> str:
    """Return the column of encoded images."""
    features = table.features
    if options.input_key is not None:
        if options.input_key not in features:
            raise UsageError(
                f"--input-key {options.input_key}: {location} has no such column (columns:"
                f" {listed(features)})"
            )
        if not _holds_images(features[options.input_key]):
            raise UsageError(
                f"--input-key {options.input_key}: that column of {location} holds"
                f" {printable(features[options.input_key], limit=80)}, not encoded images"
            )
        return options.input_key
    library = _library()
    typed = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    usual = [n for n in _IMAGE_COLUMNS if n in features and _holds_images(features[n])]
    candidates = typed or usual
    for name in _IMAGE_COLUMNS:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    what = f"several image columns ({listed(candidates)})" if candidates else "no image column"
    raise UsageError(
        f"{location}: has {what}; name the one with the encoded images with --input-key (columns:"
        f" {listed(features, 20)})"
    )


def _holds_images(feature: Any) -> bool:
    """Return whether a column contains encoded images: as a type, bytes, or bytes with a path."""
    library = _library()
    if isinstance(feature, library.Image):
        return True
    if isinstance(feature, dict):  # its bytes have the type null if no row has any
        encoded = feature.get("bytes")
        return getattr(encoded, "dtype", None) in ("binary", "large_binary", "null")
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _sizes(images: Any, column: str, left_out: LeftOut) -> Rows:
    """Return the bytes of each row's image, or -1 for a row without an image."""
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
    """Return a file that `datasets` downloaded; a table may not name other local files."""
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
    table: Any, names: Sequence[str] | None, rows: Rows, location: str, options: ImageOptions
) -> list[str]:
    if options.key_column is None:
        return [names[row] if names is not None else f"{row:09d}" for row in rows.tolist()]
    values = _values(table, options.key_column, "--key-column", location)
    keys: list[str] = []
    for row in rows.tolist():
        value = values[row]
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(
                f"--key-column {options.key_column}: row {row:,} of {location} holds"
                f" {shown(str(value))}; keys are texts or whole numbers"
            )
        keys.append(str(value))
    return keys


def _values(table: Any, path: str, option: str, location: str) -> list[Any]:
    """Return the values of a column, or of a nested field given as ``column/field``, as in timm."""
    name, *fields = [path] if path in table.features else path.split("/")
    if name not in table.features:
        raise UsageError(
            f"{option} {path}: {location} has no such column (columns:"
            f" {listed(table.features, 20)})"
        )
    column = table.select_columns([name])
    if isinstance(table.features[name], _library().Image):
        column = column.cast_column(name, _library().Image(decode=False))
        exists = fields in ([], ["bytes"], ["path"])
    else:
        exists = _feature(table, path) is not None
    if not exists:
        raise UsageError(
            f"{option} {path}: {location} has no such field (the column is"
            f" {printable(table.features[name], limit=200)})"
        )
    import pyarrow.compute as arrow

    rows: list[Any] = []
    for batch in column.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        values = batch.column(name)
        for part in fields:
            values = arrow.struct_field(values, part)
        rows += values.to_pylist()
    return rows


def _labels(
    table: Any, image: str, rows: Rows, keys: Sequence[str], location: str, options: ImageOptions
) -> Labels:
    none = Labels(np.full(len(rows), NO_LABEL, np.int32), None, ())
    if options.labels == "none":
        return none
    column = options.target_key or _label_column(table, image, location)
    if column is None:
        note = (
            f"{location}: has no column of labels (columns: {listed(table.features, 20)}), so its"
            " images have none; name the column with --target-key, or pass --labels none"
        )
        return replace(none, notes=(note,))
    values = _values(table, column, "--target-key", location)
    labels: list[Label] = []
    for row in rows.tolist():
        try:
            labels.append(_label(values[row]))
        except ValueError:
            raise DataError(
                f"--target-key {column}: row {row:,} of {location} holds"
                f" {shown(str(values[row]))}; labels are class numbers or class names: name"
                " another column, or pass --labels none"
            ) from None
    # Texts that are all numbers are class numbers, not names to be put in alphabetical order.
    texts = {label for label in labels if isinstance(label, str)}
    numbers = {text: as_number(text) for text in texts}
    if None not in numbers.values():
        labels = [numbers[label] if isinstance(label, str) else label for label in labels]
    class_names = getattr(_feature(table, column), "names", None)
    return numbered(labels, None if class_names is None else tuple(class_names), keys, location)


def _label(value: Any) -> Label:
    """Return the label that a table holds as ``value``; raise ``ValueError`` if it is none."""
    if isinstance(value, str):
        return value.strip() or None
    if value is None or value != value:  # NaN is how pandas marks a missing number
        return None
    number = as_number(int(value) if isinstance(value, bool) else value)
    if number is None:
        raise ValueError(value)
    return number


def _feature(table: Any, path: str) -> Any:
    """Return the type of a column, or of a nested field; ``None`` if there is no such field."""
    feature: Any = table.features
    for name in [path] if path in feature else path.split("/"):
        feature = feature.get(name) if isinstance(feature, dict) else None
    return feature


def _label_column(table: Any, image: str, location: str) -> str | None:
    for name in _LABEL_COLUMNS:
        if name in table.features:
            return name
    classes = _library().ClassLabel
    candidates = [
        name
        for name, feature in table.features.items()
        if name != image and isinstance(feature, classes)
    ]
    if len(candidates) > 1:
        raise UsageError(
            f"{location}: has several columns of classes ({listed(candidates)}); choose one with"
            " --target-key, or pass --labels none"
        )
    return candidates[0] if candidates else None
