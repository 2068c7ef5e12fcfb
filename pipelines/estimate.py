"""Estimate the cost of a cache from one batch: bytes, hours, memory, break-even.

scalekd cache-teacher --model swin_l --data-dir /imagenet --output ./swin_l-cache --dry-run
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from scalekd.pipelines._arithmetic import num_cores, strict_float32
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._calibrate import num_calibration_views
from scalekd.pipelines._job import Job
from scalekd.pipelines._probe import STUDENT, Disk, Probe, probe_disk, probe_job
from scalekd.pipelines._processes import Processes
from scalekd.pipelines._write_shards import num_coding_threads
from scalekd.storage import Storage
from scalekd.text import counted, format_bytes, format_duration


@dataclass(frozen=True)
class Host:
    """Resources of the process.

    Attributes:
        num_cores: Number of cores.
        num_workers: Number of processes that draw; with 0 the main process draws between forwards.
        num_coding_threads: Number of threads that encode.
        teacher_threads: Number of cores that a forward pass occupies; 0 on an accelerator.
    """

    num_cores: int
    num_workers: int
    num_coding_threads: int
    teacher_threads: int

    def seconds_per_view(self, probe: Probe, disk: Disk | None = None) -> float:
        """Return the seconds per view of a run: its slowest part, or its work over all cores."""
        return max(
            self._device_and_cores(probe.teacher_seconds, probe.draw_seconds, probe.coding_seconds),
            probe.coding_seconds / self.num_coding_threads,
            disk.seconds_per_view(probe) if disk else 0.0,
        )

    def training_seconds(self, probe: Probe, *, live: bool) -> float:
        """Return the seconds per view of training a student, with or without a live teacher."""
        device = probe.student_seconds + (probe.teacher_seconds if live else 0.0)
        return self._device_and_cores(device, probe.draw_seconds, 0.0)

    def drain_seconds(self, probe: Probe, disk: Disk | None) -> float:
        """Return the seconds after the last view, when the last block and shard are written."""
        files = probe.block_files + probe.shard_files
        return probe.block_size * probe.coding_seconds + (
            files * disk.file_seconds if disk else 0.0
        )

    def _device_and_cores(self, device: float, draw: float, coding: float) -> float:
        core_seconds = device * self.teacher_threads + draw + coding
        return max(
            device if self.num_workers else device + draw,
            draw / max(1, self.num_workers),
            core_seconds / self.num_cores,
        )

    def calibration_seconds(self, probe: Probe, num_views: int) -> float:
        """Return the seconds to draw the calibration views and run the teacher, with one thread.

        The time of fitting the codec is not included.
        """
        teacher = probe.teacher_seconds * max(1, self.teacher_threads)
        draw = probe.draw_seconds
        if not self.num_workers:
            return num_views * (teacher + draw)
        return num_views * max(teacher, draw / min(self.num_workers, self.num_cores))


class CacheEstimate(BaseModel):
    """Cost of a cache, extrapolated from one batch on this machine."""

    num_samples: int
    num_passes: int
    bytes_per_view: float
    total_bytes: float
    free_bytes: int | None = Field(description="Free on the disk of --output; null for a URL.")
    teacher_views_per_second: float | None = Field(description="null if no target needs it.")
    drawn_views_per_second_per_worker: float
    calibration_hours: float = Field(description="Part of `hours`; without fitting the codec.")
    drain_seconds: float = Field(description="Part of `hours`, after the last view.")
    hours: float
    num_files: int
    disk_bytes_per_second: float | None = Field(description="null for a URL.")
    seconds_per_file: float | None = Field(description="To create and sync; null for a URL.")
    peak_memory_bytes: int
    student: str = Field(description="Student whose step was measured.")
    student_views_per_second: float | None = Field(description="null if it was not measured.")
    live_epoch_hours: float | None = Field(
        description="An epoch of the student beside the live teacher; null without either."
    )
    cached_epoch_hours: float | None = Field(description="The same without the teacher.")
    break_even_epochs: float | None = Field(
        description="Epochs, of all students together, after which caching has taken less time than"
        " the live teacher would have; null if it never does, or without a student."
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
        disk: Disk | None = None,
    ) -> "CacheEstimate":
        """Extrapolate a probe to a whole cache that one process writes."""
        num_views = num_samples * num_passes
        calibration = host.calibration_seconds(probe, num_calibration_views)
        drain = host.drain_seconds(probe, disk)
        seconds = calibration + num_views * host.seconds_per_view(probe, disk) + drain
        live, cached, saved = None, None, 0.0
        if probe.student_seconds and probe.teacher_seconds:
            live = num_samples * host.training_seconds(probe, live=True)
            cached = num_samples * host.training_seconds(probe, live=False)
            saved = live - cached
        return cls(
            num_samples=num_samples,
            num_passes=num_passes,
            bytes_per_view=probe.bytes_per_view,
            total_bytes=probe.bytes_per_view * num_views,
            free_bytes=free_bytes,
            teacher_views_per_second=1 / probe.teacher_seconds if probe.teacher_seconds else None,
            drawn_views_per_second_per_worker=1 / probe.draw_seconds,
            calibration_hours=calibration / 3600,
            drain_seconds=drain,
            hours=seconds / 3600,
            num_files=probe.num_files(num_samples, num_passes),
            disk_bytes_per_second=disk.bytes_per_second if disk else None,
            seconds_per_file=disk.file_seconds if disk else None,
            peak_memory_bytes=peak_memory_bytes,
            student=STUDENT,
            student_views_per_second=(1 / probe.student_seconds if probe.student_seconds else None),
            live_epoch_hours=None if live is None else live / 3600,
            cached_epoch_hours=None if cached is None else cached / 3600,
            break_even_epochs=seconds / saved if saved > 0 else None,
        )

    def lines(self) -> list[str]:
        """Return the lines to print."""
        free = "" if self.free_bytes is None else f", {format_bytes(self.free_bytes)} are free"
        teacher = (
            "no teacher is run"
            if self.teacher_views_per_second is None
            else f"teacher {self.teacher_views_per_second:,.1f} views/s"
        )
        lines = [
            f"{counted(self.num_samples, 'sample')} x {counted(self.num_passes, 'pass')}:"
            f" {format_bytes(self.total_bytes)} ({self.bytes_per_view:,.0f} B per view,"
            f" without tail and tables){free}",
            f"about {_hours(self.hours)} with one process here, of which calibration takes"
            f" {_hours(self.calibration_hours)} (fitting the codec adds minutes): {teacher},"
            f" drawing {self.drawn_views_per_second_per_worker:,.0f} views/s per worker",
            f"memory so far {format_bytes(self.peak_memory_bytes)};"
            f" {counted(self.num_files, 'file')}",
        ]
        return lines if self.live_epoch_hours is None else [*lines, self._break_even()]

    def _break_even(self) -> str:
        live, cached = self.live_epoch_hours or 0.0, self.cached_epoch_hours or 0.0
        epochs = (
            f"an epoch of {self.student} (its bare step) takes {_hours(live)} with the live teacher"
            f" and {_hours(cached)} with the cache"
        )
        if self.break_even_epochs is None:
            return f"does not pay for itself: {epochs}, because drawing limits both"
        return (
            f"pays for itself after {self.break_even_epochs:,.1f} epochs of training, of all"
            f" students together: {epochs}"
        )


def _hours(hours: float) -> str:
    return format_duration(3600 * hours)


@strict_float32()
def estimate_cache(config: CacheTeacherConfig) -> CacheEstimate:
    """Run the teacher twice on one small batch, and extrapolate.

    Raises:
        ScaleKDError: Any fault that would stop a run before its first shard.
    """
    processes = Processes()
    job = Job.asked(config, processes.device)
    processes.note(*job.notes)
    (estimate,) = estimate_job(job, config.passes, [job.request.codec], with_student=True)
    return estimate


@strict_float32()
def estimate_job(
    job: Job, num_passes: int, codecs: Sequence[str], *, with_student: bool = False
) -> list[CacheEstimate]:
    """Estimate the cost of a job with each of several codecs, from one batch of the teacher.

    Args:
        job: The job.
        num_passes: Number of passes to write.
        codecs: Codecs of the features, as values of ``--codec``.
        with_student: Whether to measure a training step of a student too, for the break-even.
    """
    folder = _existing_folder(job.output)
    is_writable = folder is not None and os.access(folder, os.W_OK)
    disk = probe_disk(folder) if folder is not None and is_writable else None
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
            num_passes=num_passes,
            num_calibration_views=num_calibration_views(job),
            free_bytes=None if folder is None else shutil.disk_usage(folder).free,
            peak_memory_bytes=_peak_memory_bytes(),
            disk=disk,
        )
        for probe in probe_job(job, codecs, with_student=with_student)
    ]


def _existing_folder(output: Storage) -> Path | None:
    """Return the folder, or the nearest one above it that exists; ``None`` for a URL."""
    if output.root is None:
        return None
    folder = output.root.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _peak_memory_bytes() -> int:
    """Return the peak memory of this process so far; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
