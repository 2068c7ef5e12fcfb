"""The written record of a run: ``log.jsonl`` by steps, ``summary.csv`` by epochs.

Both are always written, whatever trackers are switched on. A resumed run first drops what was
logged after the checkpoint that it starts from, so a file never tells the same step twice.
"""

import csv
import io
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class RunningMeans:
    """Weighted means by name; the state is plain values, so that it fits a checkpoint.

    A value that is not finite is left out, as if it had not been measured: under fp16 the scaler
    skips updates whose gradient is infinite, and JSON knows no infinity.
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
        """What `merge` takes; merging it ``shares`` times adds this once."""
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
        """Drop the lines of later steps, and a last line that a crash cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, record: Mapping[str, Any]) -> None:
        stamped = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **record}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stamped) + "\n")


class EpochSummary:
    """One row an epoch; the file is replaced whole, so it is a valid CSV at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []

    def keep_until(self, epoch: int) -> None:
        """Read the rows of the epochs before ``epoch`` back."""
        if self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < epoch]
            self._save()

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
        replace_text(self.path, text.getvalue())


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, whole."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
