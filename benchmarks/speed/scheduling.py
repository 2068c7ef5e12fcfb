"""Does the teacher ever wait for the coders? A teacher and coders that only sleep.

The shipped pipeline caches views that were drawn before. Its teacher sleeps as long as a GPU would
take, its feature codec as long as a core would take for a Swin-L view of both stages, so that
cores, the interpreter's lock and arithmetic cost nothing and scheduling is all that is left. All
times are stretched, so that what this machine really does (pipeline, files) weighs less.

In the second setting the device encodes, as on the H200 of ``gpu-h200-after.jsonl``: coding takes
no time, and compressing and writing a block takes as long as the processor time of a view there.
"""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings
from scalekd.cache.cache import Cache
from scalekd.cache.codecs import CacheCodecs
from scalekd.cache.forms.zarr import _ZarrShard
from scalekd.cache.writing.writer import CacheWriter
from scalekd.codecs import FullLogitCodec, create_logit_codec
from scalekd.codecs.plain import Float16Codec
from scalekd.loading.drawing import DrawnBatch, DrawRequest
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._write_shards import write_claimed
from scalekd.shapes import FeatureShape
from scalekd.teachers import TeacherOutput
from scalekd.views import ViewPolicy, draw

_SHAPE = FeatureShape((2, 2), 8)
_CLASSES = 10
_POLICY = ViewPolicy.parse(_inputs.POLICY)
_TEACHER_VIEWS_PER_SECOND = 1300.0
_CODING_SECONDS = 0.01204  # Swin-L's two stages on one core of the machine of docs/LOG.md
_CORE_THREADS = 16
_SHARD_SIZE = 4096
_BATCH_SIZES = (128, 256)
_DEVICE_VIEWS_PER_SECOND = 1837.0
_DEVICE_WRITING_SECONDS = 0.0031  # 5.14 ms of processor time less 2.0 of drawing, both stages
_DEVICE_THREADS = 15


class SleepingTeacher(nn.Module):
    """Sleeps, then gives the same features for every view."""

    mean: Tensor

    def __init__(self, stretch: float, views_per_second: float) -> None:
        super().__init__()
        self._seconds = stretch / views_per_second
        self.register_buffer("mean", torch.zeros(1))
        generator = torch.Generator().manual_seed(0)
        self._features = torch.randn(_SHAPE.num_tokens, _SHAPE.num_channels, generator=generator)
        self._logits = torch.randn(_CLASSES, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def forward(self, pixels: Tensor) -> TeacherOutput:
        time.sleep(self._seconds * len(pixels))
        features = self._features.expand(len(pixels), -1, -1)
        return TeacherOutput({4: features}, self._logits.expand(len(pixels), -1))


class SleepingCodec(Float16Codec):
    """Sleeps, then encodes as float16."""

    seconds = 0.0

    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(self.seconds * len(features))
        return super().encode(features)


def begin_cache(root: Path, **settings: Any) -> Cache:
    """Begin a cache of the views of `FixedViews`; see :func:`_inputs.begin_cache`."""
    witnesses = np.zeros((8, 8, 8, 3), np.uint8)
    return _inputs.begin_cache(
        root, view_size=(8, 8), witnesses=witnesses, max_key_bytes=9, **settings
    )


class FixedViews:
    """Replaces drawn views with fixed arrays, so that nothing is decoded."""

    class images:
        is_remote = False

    def __getitems__(self, request: DrawRequest) -> DrawnBatch:
        count = len(request.samples)
        sizes = {"source_size": (8, 8), "view_size": (8, 8)}
        params = draw(_POLICY, seed=0, key="", pass_index=0, **sizes)
        return DrawnBatch(
            request=request,
            keys=tuple(f"{position:09d}" for position in request.samples),
            labels=np.zeros(count, np.int32),
            source_hashes=np.zeros(count, np.uint64),
            params=(params,) * count,
            pixel_hashes=np.zeros(count, np.uint64),
            pixels=torch.zeros((count, 3, 8, 8), dtype=torch.uint8),
            skipped=(),
        )


class _Marks(ProgressReport):
    """Remembers when how many views were done."""

    marks: list[tuple[float, int]]

    def __enter__(self) -> Self:
        self.marks = []
        return super().__enter__()

    def advance(self, count: int) -> None:
        super().advance(count)
        self.marks.append((time.perf_counter(), self.done))

    def steady_rate(self) -> float:
        """Views per second of the last three quarters, without the end of the last block."""
        first = next(mark for mark in self.marks if mark[1] >= self.done / 4)
        last = self.marks[-1]
        return (last[1] - first[1]) / max(last[0] - first[0], 1e-9)


def run(settings: Settings) -> dict[str, Any]:
    stretch, num_shards = (4.0, 1) if settings.quick else (10.0, 2)
    return {
        "teacher_views_per_second": _TEACHER_VIEWS_PER_SECOND,
        "coding_ms_per_view": 1e3 * _CODING_SECONDS,
        "threads": _CORE_THREADS,
        "stretch": stretch,
        "views": num_shards * _SHARD_SIZE,
        "rows": [
            measure(settings.work / f"scheduling-{size}", size, num_shards * _SHARD_SIZE, stretch)
            for size in _BATCH_SIZES
        ],
        "device": device(settings.work / "scheduling-device", stretch),
    }


def device(root: Path, stretch: float) -> dict[str, float]:
    """Measure a teacher whose device encodes, over three shards as on the H200."""
    append = _ZarrShard.append

    def slow(self: _ZarrShard, index: int, arrays: Any, rows: Any) -> None:
        time.sleep(_DEVICE_WRITING_SECONDS * stretch * len(rows.samples.keys))
        append(self, index, arrays, rows)

    with mock.patch.object(_ZarrShard, "append", slow):
        found = measure(
            root,
            128,
            3 * _SHARD_SIZE,
            stretch,
            num_threads=_DEVICE_THREADS,
            coding_seconds=0.0,
            views_per_second=_DEVICE_VIEWS_PER_SECOND,
        )
    return {
        **found,
        "views": 3 * _SHARD_SIZE,
        "threads": _DEVICE_THREADS,
        "teacher_views_per_second": _DEVICE_VIEWS_PER_SECOND,
        "writing_ms_per_view": 1e3 * _DEVICE_WRITING_SECONDS,
    }


def measure(
    root: Path,
    batch_size: int,
    num_views: int,
    stretch: float,
    *,
    num_threads: int = _CORE_THREADS,
    shard_size: int = _SHARD_SIZE,
    coding_seconds: float = _CODING_SECONDS,
    views_per_second: float = _TEACHER_VIEWS_PER_SECOND,
) -> dict[str, float]:
    """Seconds of the bare teacher and of the pipeline, at one batch size."""
    shutil.rmtree(root, ignore_errors=True)
    teacher = SleepingTeacher(stretch, views_per_second)
    pixels = torch.zeros((batch_size, 3, 8, 8), dtype=torch.uint8)
    num_batches = num_views // batch_size
    started = time.perf_counter()
    for _ in range(max(1, num_batches // 4)):
        teacher(pixels)
    bare = (time.perf_counter() - started) / max(1, num_batches // 4) * num_batches
    codec = SleepingCodec(_SHAPE)
    codec.seconds = coding_seconds * stretch
    logits = create_logit_codec("full", _CLASSES)
    cache = begin_cache(
        root,
        num_samples=num_views,
        codec=codec,
        logits=logits,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    job: Any = SimpleNamespace(teacher=teacher, drawn=FixedViews(), precision="fp32", workers=0)
    if not isinstance(logits, FullLogitCodec):
        raise TypeError(f"{type(logits)} is no full logit codec")
    shards = [(0, shard) for shard in range(num_views // shard_size)]
    with (
        CacheWriter(cache, num_threads=num_threads) as writer,
        _Marks("", num_views, enabled=False) as progress,
    ):
        started = time.perf_counter()
        codecs = CacheCodecs({4: codec}, logits)
        num_written = write_claimed(job, writer, codecs, shards, progress)
        cached = time.perf_counter() - started
    if num_written != len(shards):
        raise RuntimeError(f"{num_written} shards were written, not {len(shards)}")
    shutil.rmtree(root)
    return {
        "batch_size": batch_size,
        "bare_seconds": bare,
        "seconds": cached,
        "over_bare": cached / bare,
        "steady_over_bare": num_views / progress.steady_rate() / bare,
    }
