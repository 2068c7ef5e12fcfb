"""Opening and reading caches of a thousand to a million views: what grows, and what stays flat.

Targets are tiny (2 x 2 tokens of 8 channels, int8; 10 classes) and made up; everything else is as
in a real cache, written by the shipped writer. Each size is opened and read in a process of its
own: 100 batches of the shuffled order, targets and parameters of views, without images.
"""

import json
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings, resident_bytes
from scalekd.cache import open_cache
from scalekd.codecs import create_logit_codec, fit_codec
from scalekd.loading.blocks import BlockReader
from scalekd.loading.order import EpochOrder
from scalekd.shapes import FeatureShape

_SHAPE = FeatureShape((2, 2), 8)
_BATCHES = 100
_BATCH = 64


def run(settings: Settings) -> dict[str, Any]:
    sizes = (1_000, 10_000, 100_000) if settings.quick else (1_000, 10_000, 100_000, 1_000_000)
    rows = []
    for size in sizes:
        root = settings.work / f"growth-{size}"
        shutil.rmtree(root, ignore_errors=True)
        started = time.process_time()
        write(root, size)
        seconds = time.process_time() - started
        total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        opened = [_opened(root) for _ in range(3)]
        rows.append(
            {
                "views": size,
                "write_us_per_view": 1e6 * seconds / size,
                "bytes_per_view": total / size,
                **{name: sorted(found[name] for found in opened)[1] for name in opened[0]},
            }
        )
        shutil.rmtree(root)
    return {"batches": _BATCHES, "batch_size": _BATCH, "rows": rows}


def write(root: Path, num_views: int) -> None:
    """A cache of so many views."""
    features = _inputs.made_up_features(_SHAPE, 256, seed=0)
    scores = np.random.default_rng(0).standard_normal((256, 10), np.float32)
    _inputs.write_plain_cache(
        root,
        num_views=num_views,
        codec=fit_codec("int8", _SHAPE),
        logits=create_logit_codec("full", 10),
        targets=lambda _first, count: (features[:count], scores[:count]),
    )


def _opened(root: Path) -> dict[str, float]:
    completed = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.growth", str(root)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(completed.stdout)


def read(root: Path) -> dict[str, float]:
    """Open a cache and read some batches; return processor seconds and memory."""
    before = resident_bytes()
    started = time.process_time()
    reader = open_cache(root)
    opened = time.process_time()
    num_views = len(reader.samples)
    listed = time.process_time()
    order = EpochOrder(tuple(reader.blocks()), min(_BATCH, num_views // 2), seed=0)
    names = [array.name for array in reader.layout.views]
    blocks = BlockReader(reader, names)
    batches = order.batches(0)
    next(batches)
    ordered = time.process_time()
    done = 0
    for samples in islice(batches, _BATCHES):
        for sample in samples:
            blocks.find(0, int(sample))
        done += len(samples)
    finished = time.process_time()
    return {
        "open_seconds": opened - started,
        "sample_table_seconds": listed - opened,
        "first_batch_order_seconds": ordered - listed,
        "read_us_per_view": 1e6 * (finished - ordered) / done,
        "resident_bytes_more": resident_bytes() - before,
    }


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))
