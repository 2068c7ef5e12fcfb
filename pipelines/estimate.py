"""What a cache would cost, from a probe of one batch: bytes, hours, memory, and when it pays."""

import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from accelerate import PartialState
from pydantic import BaseModel

from scalekd.codecs import create_logit_codec, fit_codec, parse_codec
from scalekd.loading.drawing import DrawnViews, DrawRequest
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._preflight import load_checked_teacher, preflight
from scalekd.pipelines._write_shards import num_coding_threads, run_teacher

_PROBE_VIEWS = 64
_TRAINING_EPOCHS = 300  # the paper's recipes
_TAR_BYTES = 2560  # a view's three headers, its label's block, and half a block after the others
_TAR_BYTES_WITHOUT_IMAGE = 1792


class CacheEstimate(BaseModel):
    """A price, extrapolated from a probe on this machine."""

    num_samples: int
    num_passes: int
    bytes_per_view: float
    total_bytes: float
    free_bytes: int
    teacher_views_per_second: float
    drawn_views_per_second_per_worker: float
    hours: float
    peak_memory_bytes: int
    break_even_students: float

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.num_samples:,} samples x {self.num_passes} passes:"
            f" {self.total_bytes / 1e9:,.2f} GB ({self.bytes_per_view:,.0f} B a view),"
            f" {self.free_bytes / 1e9:,.1f} GB are free",
            f"about {self.hours:,.2f} h here: teacher {self.teacher_views_per_second:,.1f} views/s,"
            f" drawing {self.drawn_views_per_second_per_worker:,.0f} views/s a worker",
            f"memory so far {self.peak_memory_bytes / 1e9:.1f} GB",
            f"teacher forwards: as many as online training of {self.break_even_students:.3f}"
            f" students of {_TRAINING_EPOCHS} epochs",
        ]


def estimate_cache(config: CacheTeacherConfig) -> CacheEstimate:
    """Draw and run one small batch, twice, and extrapolate.

    Raises:
        ScaleKDError: Whatever would stop the real run before its first shard.
    """
    images, policy = preflight(config)
    state = PartialState()
    teacher = load_checked_teacher(config).to(state.device)
    spec = teacher.spec
    drawn = DrawnViews(
        images, policy, config.seed, spec.img_size, config.skip_corrupt, embed=config.embed
    )
    count = min(len(images), _PROBE_VIEWS, config.batch_size)
    started = time.perf_counter()
    batch = drawn.draw(DrawRequest(0, 0, range(count)))
    draw_seconds = (time.perf_counter() - started) / count
    run_teacher(teacher, batch.pixels, config.precision)
    started = time.perf_counter()
    output = run_teacher(teacher, batch.pixels, config.precision)
    teacher_seconds = (time.perf_counter() - started) / count
    num_bytes, coding = sum(map(len, batch.images)), 0.0
    if config.form is not None:
        num_bytes += count * (_TAR_BYTES if batch.images else _TAR_BYTES_WITHOUT_IMAGE)
    request = parse_codec(config.codec)
    for stage in config.stages:
        features = output.features[stage]
        codec = fit_codec(request, spec.stages[stage], [features])
        started = time.perf_counter()
        num_bytes += sum(map(len, codec.pack(codec.encode(features)).values()))
        coding += (time.perf_counter() - started) / count / num_coding_threads()
    if output.logits is not None and config.logits != "none":
        logits = create_logit_codec(config.logits, output.logits.shape[1])
        num_bytes += sum(map(len, logits.pack(logits.encode(output.logits)).values()))
    per_view = num_bytes / count + np.dtype(np.uint64).itemsize * 2
    views = len(images) * config.passes
    drawing = draw_seconds / max(1, config.workers)
    existing = next(
        path
        for path in (config.folder, *config.folder.resolve().parents, Path("/"))
        if path.exists()
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return CacheEstimate(
        num_samples=len(images),
        num_passes=config.passes,
        bytes_per_view=per_view,
        total_bytes=per_view * views,
        free_bytes=shutil.disk_usage(existing).free,
        teacher_views_per_second=1 / teacher_seconds,
        drawn_views_per_second_per_worker=1 / draw_seconds,
        hours=max(teacher_seconds, drawing, coding) * views / 3600,
        peak_memory_bytes=peak * (1 if sys.platform == "darwin" else 1024),
        break_even_students=config.passes / _TRAINING_EPOCHS,
    )
