"""The written record of a run: ``log.jsonl`` by steps, ``summary.csv`` by epochs.

Both are always written, whatever trackers are switched on. A resumed run first drops what was
logged after the checkpoint that it starts from, so a file never contains the same step twice.
"""

import csv
import io
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scalekd.errors import DataError
from scalekd.storage.files import commit_file, temporary_path

_MAX_SUMMARY_BYTES = 32 << 20  # a row has about 200 bytes
_MAX_COLUMNS = 200
_MAX_NAME = 100
_MAX_VALUE = 1e30
_MAX_LINE_BYTES = 1 << 20
_REQUIRED = ("epoch", "samples_viewed", "train_loss", "seconds")


class RunningMeans:
    """Weighted means by name; the state is plain values, so that it fits a checkpoint.

    A value that is not finite is left out, as if it had not been measured: under fp16 the scaler
    skips updates whose gradient is infinite, and JSON has no infinity.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weight = 0.0
        self.left_out: dict[str, float] = {}  # weight by name

    def add(self, values: Mapping[str, float], weight: float) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value * weight
            else:
                self.left_out[name] = self.left_out.get(name, 0.0) + weight
        self.weight += weight

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add another's state, such as another process's."""
        for name, value in other["sums"].items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, weight in other.get("left_out", {}).items():  # old checkpoints lack it
            self.left_out[name] = self.left_out.get(name, 0.0) + weight
        self.weight += other["weight"]

    def means(self) -> dict[str, float]:
        return {
            name: total / max(self.weight - self.left_out.get(name, 0.0), 1e-12)
            for name, total in self.sums.items()
        }

    def state(self, *, shares: int = 1) -> dict[str, Any]:
        """Return the state for `merge`; merging it ``shares`` times adds these means once."""
        return {
            "sums": {name: total / shares for name, total in self.sums.items()},
            "weight": self.weight / shares,
            "left_out": {name: weight / shares for name, weight in self.left_out.items()},
        }


class StepLog:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_until(self, step: int) -> None:
        """Drop the lines of later steps, and lines that a crash cut short or that are damaged."""
        if not self.path.exists():
            return
        with temporary_path(self.path) as temporary:
            with self.path.open("rb") as lines, temporary.open("wb") as kept:
                while line := lines.readline(_MAX_LINE_BYTES):
                    if _step_of(line) <= step:
                        kept.write(line)
            temporary.replace(self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        stamped = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **record}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stamped) + "\n")


class EpochSummary:
    """One row an epoch; the file is replaced whole, so it is a valid CSV at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []

    def keep_until(self, epoch: int) -> int:
        """Read the rows of the epochs before ``epoch`` back, and drop the others.

        Returns:
            How many rows were dropped.

        Raises:
            DataError: The file is damaged.
        """
        if not self.path.exists():
            return 0
        rows = _read_rows(self.path)
        self.rows = [row for row in rows if _number(row, "epoch", self.path) < epoch]
        self._save()
        return len(rows) - len(self.rows)

    def num_epochs(self) -> int:
        """Number of epochs in the file; 0 if the file does not exist or cannot be read."""
        try:
            return len(_read_rows(self.path)) if self.path.exists() else 0
        except DataError:
            return 0

    def write(self, row: Mapping[str, float]) -> None:
        self.rows.append({name: f"{value:.8g}" for name, value in row.items()})
        self._save()

    def _save(self) -> None:
        # Epochs without evaluation have fewer columns; the header is the union, in order.
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        commit_file(self.path, text.getvalue().encode())


def read_summary(path: Path) -> list[dict[str, float]]:
    """Read a run's ``summary.csv``, which may come from someone else's machine.

    Returns:
        Columns of each epoch that have a value.

    Raises:
        DataError: It is missing, damaged, or not the summary of a run.
    """
    rows = [
        {name: _number(row, name, path) for name, text in row.items() if text}
        for row in _read_rows(path)
    ]
    if not rows:
        raise DataError(f"{path}: not the summary of a run: it has no epoch")
    for number, row in enumerate(rows):
        for name in _REQUIRED:
            if name not in row:
                raise DataError(f"{path}: not the summary of a run: row {number + 1} has no {name}")
    return rows


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        size = path.stat().st_size
        if size > _MAX_SUMMARY_BYTES:
            raise DataError(f"{path}: has {size:,} bytes, more than any run's summary")
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            if len(names) > _MAX_COLUMNS or any(len(name) > _MAX_NAME for name in names):
                raise DataError(f"{path}: not the summary of a run: too many or too long columns")
            rows = [dict(row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():  # more or fewer fields than the header
            raise DataError(f"{path}: row {number + 1} does not have {len(names)} fields")
    return rows


def _number(row: Mapping[str, str], name: str, path: Path) -> float:
    text = row.get(name) or ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _MAX_VALUE or (name == "epoch" and not (0 <= value == int(value))):
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise DataError(f"{path}: not the summary of a run: {name} is {shown!r}")
    return value


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) and line.endswith(b"\n") else math.inf
