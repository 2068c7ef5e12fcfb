"""Write exported targets block by block: NumPy, Parquet, safetensors.

A file is written under a temporary name and renamed when it is complete. Memory does not grow with
the number of rows.
"""

import json
import math
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scalekd.errors import UsageError
from scalekd.storage.files import temporary_beside

Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ExportShape:
    """Shape of an export, known before the first row.

    Attributes:
        what: Name of the values.
        num_rows: Number of views.
        row_shape: Shape of the values of one view.
        dtype: Type of the values.
        max_key_bytes: Length of the longest key in UTF-8.
        facts: Description of the cache and of the export, for the file's metadata.
    """

    what: str
    num_rows: int
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    max_key_bytes: int
    facts: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Size of the values alone."""
        return self.num_rows * math.prod(self.row_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ExportBlock:
    """Consecutive rows of an export.

    Attributes:
        keys: Keys of the samples.
        passes: Pass of each view.
        labels: Label of each sample, or -1.
        values: Values, ``(view, *row_shape)``.
    """

    keys: Sequence[str]
    passes: Rows
    labels: Rows
    values: Rows


class ExportFile(ABC):
    """Destination of an export.

    Args:
        path: File or folder to write to.
        shape: Shape of the export.
    """

    is_folder: ClassVar[bool] = False

    def __init__(self, path: Path, shape: ExportShape) -> None:
        self.path, self.shape, self._row = path, shape, 0

    def write(self, block: ExportBlock) -> None:
        """Write the next rows."""
        rows = slice(self._row, self._row + len(block.keys))
        self._row = rows.stop
        self._write(block, rows)

    @abstractmethod
    def _write(self, block: ExportBlock, rows: slice) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Finish the file."""


class NumpyFolder(ExportFile):
    """A folder: values, keys, passes and labels as ``.npy`` files, and ``facts.json``."""

    is_folder = True

    def __init__(self, path: Path, shape: ExportShape) -> None:
        super().__init__(path, shape)
        path.mkdir()
        text = json.dumps(dict(shape.facts), indent=2, sort_keys=True) + "\n"
        (path / "facts.json").write_text(text, encoding="utf-8")
        self._values = self._open(shape.what, shape.dtype, shape.row_shape)
        self._keys = self._open("keys", np.dtype(f"U{max(1, shape.max_key_bytes)}"))
        self._passes = self._open("passes", np.dtype(np.int32))
        self._labels = self._open("labels", np.dtype(np.int32))

    def _open(self, name: str, dtype: np.dtype[Any], row: tuple[int, ...] = ()) -> Rows:
        return np.lib.format.open_memmap(
            self.path / f"{name}.npy", mode="w+", dtype=dtype, shape=(self.shape.num_rows, *row)
        )

    def _write(self, block: ExportBlock, rows: slice) -> None:
        self._values[rows] = block.values
        self._keys[rows] = block.keys
        self._passes[rows] = block.passes
        self._labels[rows] = block.labels

    def close(self) -> None:
        for array in (self._values, self._keys, self._passes, self._labels):
            array.flush()  # type: ignore[attr-defined]


class ParquetFile(ExportFile):
    """A table with the columns ``key``, ``pass``, ``label`` and the values as a list.

    The values of a view are one list of fixed length; ``shape`` in the metadata is their shape.
    """

    def __init__(self, path: Path, shape: ExportShape) -> None:
        super().__init__(path, shape)
        arrow, parquet = _arrow()
        values = arrow.list_(arrow.from_numpy_dtype(shape.dtype), math.prod(shape.row_shape))
        columns = {
            "key": arrow.string(),
            "pass": arrow.int32(),
            "label": arrow.int32(),
            shape.what: values,
        }
        self._arrow = arrow
        self._schema = arrow.schema(list(columns.items()), metadata=dict(shape.facts))
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")

    def _write(self, block: ExportBlock, rows: slice) -> None:
        arrow, schema = self._arrow, self._schema
        flat = arrow.array(np.ascontiguousarray(block.values).reshape(-1))
        values = arrow.FixedSizeListArray.from_arrays(flat, math.prod(self.shape.row_shape))
        columns = [
            arrow.array(block.keys, arrow.string()),
            arrow.array(block.passes, arrow.int32()),
            arrow.array(block.labels, arrow.int32()),
            values,
        ]
        self._writer.write_batch(arrow.record_batch(columns, schema=schema))

    def close(self) -> None:
        self._writer.close()


class SafetensorsFile(ExportFile):
    """Tensors: the values, ``keys`` as zero-padded UTF-8, ``passes`` and ``labels``.

    The header is written first, since the number of rows is known; the package safetensors would
    need all values in memory.
    """

    _DTYPES: ClassVar = {"float32": "F32", "float16": "F16", "int32": "I32", "uint8": "U8"}

    def __init__(self, path: Path, shape: ExportShape) -> None:
        super().__init__(path, shape)
        rows, width = shape.num_rows, max(1, shape.max_key_bytes)
        tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            shape.what: (shape.dtype, (rows, *shape.row_shape)),
            "labels": (np.dtype(np.int32), (rows,)),
            "passes": (np.dtype(np.int32), (rows,)),
            "keys": (np.dtype(np.uint8), (rows, width)),
        }
        header: dict[str, Any] = {"__metadata__": dict(shape.facts)}
        end, offsets = 0, {}
        for name, (dtype, size) in tensors.items():
            start, end = end, end + math.prod(size) * dtype.itemsize
            offsets[name] = start
            header[name] = {
                "dtype": self._DTYPES[dtype.name],
                "shape": list(size),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            first = file.tell()
            file.truncate(first + end)
        self._arrays = {
            name: np.memmap(path, dtype, "r+", first + offsets[name], size)
            for name, (dtype, size) in tensors.items()
        }

    def _write(self, block: ExportBlock, rows: slice) -> None:
        width = self._arrays["keys"].shape[1]
        encoded = np.array([key.encode() for key in block.keys], f"S{width}")
        self._arrays[self.shape.what][rows] = block.values
        self._arrays["keys"][rows] = encoded.view(np.uint8).reshape(len(encoded), width)
        self._arrays["passes"][rows] = block.passes
        self._arrays["labels"][rows] = block.labels

    def close(self) -> None:
        for array in self._arrays.values():
            array.flush()


FILES: dict[str, type[ExportFile]] = {
    "npy": NumpyFolder,
    "parquet": ParquetFile,
    "safetensors": SafetensorsFile,
}


def check_form(form: str) -> None:
    """Check that the packages of a form are installed.

    Raises:
        UsageError: A package is missing.
    """
    if form == "parquet":
        _arrow()


@contextmanager
def open_export(form: str, path: Path, shape: ExportShape) -> Iterator[ExportFile]:
    """Open a destination; it appears under ``path`` when the block ends without an error."""
    kind, temporary = FILES[form], temporary_beside(path)
    try:
        file = kind(temporary, shape)
        yield file
        file.close()
        temporary.rename(path)
    finally:
        if kind.is_folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            "--to parquet needs the package pyarrow: pip install 'scalekd[hf]', or pass --to npy"
        ) from None
    return pyarrow, pyarrow.parquet
