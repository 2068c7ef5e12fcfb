"""Writes and reads one form in a process of its own, and prints what it cost as JSON.

    python -m benchmarks.speed._formats_child --form NAME --payload F.npz --root DIR [--write]

Runs with NumPy and the form's own library alone: one of them cannot be installed beside this
project's dependencies.
"""

import argparse
import copy
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed._formats import BATCH, FORMS, Batch, Form

_MOST_SECONDS = 4.0  # of one order; slow forms are asked for fewer views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=list(FORMS), required=True)
    parser.add_argument("--payload", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with np.load(arguments.payload, allow_pickle=False) as file:
        features, logits = file["features"], file["logits"]
    form = FORMS[arguments.form](arguments.root, len(features))
    found: dict[str, Any] = {}
    if arguments.write:
        arguments.root.mkdir(parents=True)
        form.prepare(features)
        warm = copy.copy(form)  # imports are no part of writing
        warm.root, warm.num_views = arguments.root.with_suffix(".warm"), BATCH
        warm.root.mkdir()
        warm.write(features[:BATCH], logits[:BATCH])
        wall, cpu = _now()
        form.write(features, logits)
        found["write"] = _per_view(wall, cpu, len(features))
        files = [path for path in arguments.root.rglob("*") if path.is_file()]
        found["bytes_per_view"] = sum(path.stat().st_size for path in files) / len(features)
        found["files"] = len(files)
    form.open()
    wall, cpu = _now()
    form.open()  # the first time imports as well
    found["open_seconds"] = _now()[0] - wall
    for order in (
        ("sequential", "shuffled") if form.streams else ("sequential", "shuffled", "random")
    ):
        check(form, order, features, logits)
        found[order] = _read(form.batches(order))
    print(json.dumps(found))


def check(form: Form, order: str, features: np.ndarray[Any, Any], logits: Any) -> None:
    """The first batch holds views of the payload, whole, and in the order that was asked for."""
    got, scores = next(form.batches(order))
    exact = got.dtype == features.dtype
    known = {row.tobytes(): index for index, row in enumerate(logits)}
    indices = [known.get(row.tobytes(), -1) for row in np.ascontiguousarray(scores)]
    if -1 in indices or (exact and not np.array_equal(got, features[indices])):
        raise RuntimeError(f"{type(form).__name__}: {order} reading gave other views than written")
    if (indices == sorted(indices)) != (order == "sequential"):
        raise RuntimeError(f"{type(form).__name__}: {order} reading is in another order")


def _read(batches: Iterator[Batch]) -> dict[str, float]:
    wall, cpu = _now()
    num_views = 0
    for features, _ in batches:
        num_views += len(features)
        if _now()[1] - cpu > _MOST_SECONDS:
            break
    return _per_view(wall, cpu, num_views)


def _now() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def _per_view(wall: float, cpu: float, num_views: int) -> dict[str, float]:
    after = _now()
    return {
        "wall_us": 1e6 * (after[0] - wall) / num_views,
        "cpu_us": 1e6 * (after[1] - cpu) / num_views,
        "views": num_views,
    }


if __name__ == "__main__":
    main()
