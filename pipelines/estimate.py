"""What a cache would cost, from a probe of one batch: bytes, hours, memory, and when it pays.

scalekd cache-teacher --model swin_l --data-dir /imagenet --output ./swin_l-cache --dry-run
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field

from scalekd.cache.layout import pixel_arrays
from scalekd.codecs import FeatureCodec, LogitCodec, create_logit_codec, fit_codec, parse_codec
from scalekd.errors import DataError
from scalekd.loading.drawing import DrawRequest
from scalekd.pipelines._arithmetic import num_cores, strict_float32
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._calibrate import num_calibration_views
from scalekd.pipelines._job import Job
from scalekd.pipelines._processes import Processes
from scalekd.pipelines._teacher_stream import TeacherArrays
from scalekd.pipelines._write_shards import num_coding_threads, run_teacher
from scalekd.storage import open_storage
from scalekd.threads import one_thread
from scalekd.views import pixel_differences

_PROBE_VIEWS = 64
_HASH_BYTES = 16  # a view's pixel hash and its sample's source hash; neither compresses


@dataclass(frozen=True)
class Probe:
    """What one batch took, by view.

    Attributes:
        teacher_seconds: Seconds of a forward, with all threads of the process on a CPU.
        draw_seconds: Seconds of one core to read, decode and augment an image.
        coding_seconds: Seconds of one core to encode and compress the targets.
        target_bytes: Compressed bytes of features and logits.
        image_bytes: Bytes of an embedded image; 0 if none is kept.
        overhead_bytes: Bytes of what the form of the cache adds to a view.
    """

    teacher_seconds: float
    draw_seconds: float
    coding_seconds: float
    target_bytes: float
    image_bytes: float = 0.0
    overhead_bytes: int = 0

    @property
    def bytes_per_view(self) -> float:
        """Bytes that a view takes on disk."""
        return self.target_bytes + self.image_bytes + self.overhead_bytes + _HASH_BYTES


@dataclass(frozen=True)
class Host:
    """What the process may use.

    Attributes:
        num_cores: Cores.
        num_workers: Processes that draw; with 0 the main process draws between forwards.
        num_coding_threads: Threads that encode.
        teacher_threads: Cores that a forward keeps busy; 0 if it runs on an accelerator.
    """

    num_cores: int
    num_workers: int
    num_coding_threads: int
    teacher_threads: int

    def seconds_per_view(self, probe: Probe) -> float:
        """Seconds between two views of a run: its slowest part, or its work over all cores."""
        teacher, draw, coding = probe.teacher_seconds, probe.draw_seconds, probe.coding_seconds
        core_seconds = teacher * self.teacher_threads + draw + coding
        return max(
            teacher if self.num_workers else teacher + draw,
            draw / max(1, self.num_workers),
            coding / self.num_coding_threads,
            core_seconds / self.num_cores,
        )

    def calibration_seconds(self, probe: Probe, num_views: int) -> float:
        """Seconds to draw the calibration views and run the teacher on them, with one thread.

        Fitting the codec comes on top.
        """
        teacher = probe.teacher_seconds * max(1, self.teacher_threads)
        draw = probe.draw_seconds
        if not self.num_workers:
            return num_views * (teacher + draw)
        return num_views * max(teacher, draw / min(self.num_workers, self.num_cores))


class CacheEstimate(BaseModel):
    """A price, extrapolated from a probe on this machine."""

    num_samples: int
    num_passes: int
    bytes_per_view: float
    total_bytes: float
    free_bytes: int | None = Field(description="Free on the disk of --output; null for a URL.")
    teacher_views_per_second: float | None = Field(description="null if no target needs it.")
    drawn_views_per_second_per_worker: float
    calibration_hours: float = Field(description="Part of `hours`; without fitting the codec.")
    hours: float
    peak_memory_bytes: int
    break_even_epochs: float | None = Field(
        description="Epochs, of all students together, from which on training with the live"
        " teacher would have spent more time in the teacher than caching takes."
    )

    @classmethod
    def of(
        cls,
        probe: Probe,
        host: Host,
        *,
        num_samples: int,
        num_passes: int,
        num_calibration_views: int,
        free_bytes: int | None,
        peak_memory_bytes: int,
    ) -> "CacheEstimate":
        """Extrapolate a probe to a whole cache, written by one process."""
        num_views = num_samples * num_passes
        calibration = host.calibration_seconds(probe, num_calibration_views)
        seconds = calibration + num_views * host.seconds_per_view(probe)
        epoch = num_samples * probe.teacher_seconds
        return cls(
            num_samples=num_samples,
            num_passes=num_passes,
            bytes_per_view=probe.bytes_per_view,
            total_bytes=probe.bytes_per_view * num_views,
            free_bytes=free_bytes,
            teacher_views_per_second=1 / probe.teacher_seconds if probe.teacher_seconds else None,
            drawn_views_per_second_per_worker=1 / probe.draw_seconds,
            calibration_hours=calibration / 3600,
            hours=seconds / 3600,
            peak_memory_bytes=peak_memory_bytes,
            break_even_epochs=seconds / epoch if epoch else None,
        )

    def lines(self) -> list[str]:
        """For people."""
        free = "" if self.free_bytes is None else f", {self.free_bytes / 1e9:,.1f} GB are free"
        teacher = (
            "no teacher is run"
            if self.teacher_views_per_second is None
            else f"teacher {self.teacher_views_per_second:,.1f} views/s"
        )
        lines = [
            f"{self.num_samples:,} samples x {self.num_passes} passes:"
            f" {self.total_bytes / 1e9:,.2f} GB ({self.bytes_per_view:,.0f} B a view,"
            f" without tail and tables){free}",
            f"about {self.hours:,.2f} h with one process here, {self.calibration_hours:,.2f} h of"
            f" them calibration (fitting the codec adds minutes): {teacher}, drawing"
            f" {self.drawn_views_per_second_per_worker:,.0f} views/s a worker",
            f"memory so far {self.peak_memory_bytes / 1e9:.1f} GB",
        ]
        if self.break_even_epochs is not None:
            lines.append(
                f"pays for itself after {self.break_even_epochs:,.1f} epochs of training, of all"
                " students together: a live teacher would have taken longer"
            )
        return lines


@strict_float32()
def estimate_cache(config: CacheTeacherConfig) -> CacheEstimate:
    """Draw and run one small batch, twice, and extrapolate.

    Raises:
        ScaleKDError: Whatever would stop the real run before its first shard.
    """
    processes = Processes()
    job = Job.asked(config, processes.device)
    for line in job.notes:
        processes.note(line)
    (estimate,) = estimate_job(job, config, [job.request.codec])
    return estimate


@strict_float32()
def estimate_job(
    job: Job, config: CacheTeacherConfig, codecs: Sequence[str]
) -> list[CacheEstimate]:
    """Estimate the cost of a job with each of several codecs, from one batch of the teacher.

    Args:
        job: The job.
        config: Its configuration, for the number of passes and the output.
        codecs: Codecs of the features, as ``--codec``.
    """
    host = Host(
        num_cores=num_cores(),
        num_workers=job.workers,
        num_coding_threads=num_coding_threads(),
        teacher_threads=torch.get_num_threads() if job.teacher.device.type == "cpu" else 0,
    )
    return [
        CacheEstimate.of(
            probe,
            host,
            num_samples=len(job.images),
            num_passes=config.passes,
            num_calibration_views=num_calibration_views(job),
            free_bytes=_free_bytes(config.output),
            peak_memory_bytes=_peak_memory_bytes(),
        )
        for probe in _probes(job, codecs)
    ]


def _probes(job: Job, codecs: Sequence[str]) -> Iterator[Probe]:
    at_most = min(len(job.images), _PROBE_VIEWS, job.batch_size)
    started = time.perf_counter()
    batch = job.drawn.draw(DrawRequest(0, 0, range(at_most)))
    draw_seconds = time.perf_counter() - started
    count = len(batch.keys)
    if not count:
        raise DataError(f"{job.images.location}: every image of the probe is corrupt")
    image_bytes = sum(map(len, batch.images))
    pixel_seconds = 0.0
    if job.form.embed == "pixels":
        started = time.perf_counter()
        (array,) = pixel_arrays(job.drawn.view_size)
        differences = pixel_differences(batch.pixels.numpy())
        image_bytes = len(array.pack(differences))
        pixel_seconds = time.perf_counter() - started
    output = None
    teacher_seconds = 0.0
    if job.keeps_targets:
        run_teacher(job.teacher, batch.pixels, job.precision)
        started = time.perf_counter()
        output = run_teacher(job.teacher, batch.pixels, job.precision)
        teacher_seconds = time.perf_counter() - started
    for codec in codecs:
        target_bytes, coding_seconds = (0, 0.0) if output is None else _coded(job, output, codec)
        yield Probe(
            teacher_seconds=teacher_seconds / count,
            draw_seconds=draw_seconds / count,
            coding_seconds=(coding_seconds + pixel_seconds) / count,
            target_bytes=target_bytes / count,
            image_bytes=image_bytes / count,
            overhead_bytes=job.form.overhead_bytes,
        )


@one_thread()
def _coded(job: Job, output: TeacherArrays, codec: str) -> tuple[int, float]:
    """Bytes of a batch's targets, and seconds that one thread takes to code them."""
    request, stages = parse_codec(codec), job.teacher.spec.stages
    coded: list[tuple[FeatureCodec | LogitCodec, np.ndarray[Any, Any]]] = [
        (fit_codec(request, stages[stage], [output.features[stage]]), output.features[stage])
        for stage in job.request.stages
    ]
    if output.logits is not None and job.request.logits != "none":
        logits = create_logit_codec(job.request.logits, output.logits.shape[1])
        coded.append((logits, output.logits))
    started = time.perf_counter()
    num_bytes = sum(
        len(part) for each, values in coded for part in each.pack(each.encode(values)).values()
    )
    return num_bytes, time.perf_counter() - started


def _free_bytes(output: str | Path) -> int | None:
    """Free bytes of the disk that a folder is or will be on; ``None`` for a URL."""
    storage = open_storage(output)
    if storage.is_remote:
        return None
    folder = Path(storage.location).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _peak_memory_bytes() -> int:
    """Largest memory of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
