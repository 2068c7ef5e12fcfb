"""Short measurements for an estimate: the teacher, coding, a student's step, and the disk."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalekd.cache.layout import pixel_arrays
from scalekd.codecs import FeatureCodec, LogitCodec, create_logit_codec, fit_codec, parse_codec
from scalekd.codecs.encoder import FeatureEncoder
from scalekd.errors import DataError
from scalekd.loading.drawing import DrawnBatch, DrawRequest
from scalekd.pipelines._job import Job
from scalekd.pipelines._teacher_stream import AUTOCAST, TeacherArrays, default_encoder
from scalekd.pipelines._write_shards import run_teacher
from scalekd.storage.files import commit_file
from scalekd.students import create_student
from scalekd.threads import one_thread
from scalekd.views import pixel_differences, view_columns

STUDENT = "resnet50"
"""Student whose step is measured; most of the published pairs' students cost about as much."""

_PROBE_VIEWS = 64
_STUDENT_VIEWS = {"cpu": 4}  # of a step; 64 on accelerators
_STUDENT_SECONDS = 3.0  # of steps after the first
_MOST_STEPS = 5
_HASH_BYTES = 16  # a view's pixel hash and its sample's source hash; neither compresses
_DISK_BYTES = 16 << 20
_DISK_FILES = 4
_SAMPLE_FILES = 4  # keys, labels, source hashes and their record


@dataclass(frozen=True)
class Probe:
    """Cost of one batch, per view.

    Attributes:
        teacher_seconds: Seconds of a forward pass, with all threads of the process on a CPU;
            includes encoding if the device encodes.
        draw_seconds: Seconds of one core to read, decode and augment an image.
        coding_seconds: Seconds of one core to encode and compress the targets.
        target_bytes: Compressed bytes of features and logits.
        image_bytes: Bytes of an embedded image; 0 if images are not embedded.
        overhead_bytes: Bytes that the form of the cache adds to a view.
        student_seconds: Seconds of a training step of the student; 0 if not measured.
        block_size: Number of views in a block, which one thread compresses and writes.
        block_files: Number of files of a block.
        shard_size: Number of views in a shard, which are committed together.
        shard_files: Number of files of a shard besides those of its blocks, record included.
    """

    teacher_seconds: float
    draw_seconds: float
    coding_seconds: float
    target_bytes: float
    image_bytes: float = 0.0
    overhead_bytes: int = 0
    student_seconds: float = 0.0
    block_size: int = 1
    block_files: int = 0
    shard_size: int = 1
    shard_files: int = 0

    @property
    def bytes_per_view(self) -> float:
        """Bytes of a view on disk."""
        return self.target_bytes + self.image_bytes + self.overhead_bytes + _HASH_BYTES

    @property
    def files_per_view(self) -> float:
        """Number of files that are written per view of a large cache."""
        return self.block_files / self.block_size + self.shard_files / self.shard_size

    def num_files(self, num_samples: int, num_passes: int) -> int:
        """Return the number of files of all shards, records included."""
        blocks, shards = -(-num_samples // self.block_size), -(-num_samples // self.shard_size)
        of_pass = blocks * self.block_files + shards * self.shard_files
        return num_passes * of_pass + shards * _SAMPLE_FILES


@dataclass(frozen=True)
class Disk:
    """Cost of writing a file.

    Attributes:
        bytes_per_second: Rate of writing and syncing a large file.
        file_seconds: Seconds to create, sync and rename a small file.
    """

    bytes_per_second: float
    file_seconds: float

    def seconds_per_view(self, probe: Probe) -> float:
        """Return the seconds that the disk takes for a view."""
        return probe.bytes_per_view / self.bytes_per_second + (
            self.file_seconds * probe.files_per_view
        )


def probe_job(job: Job, codecs: Sequence[str], *, with_student: bool) -> Iterator[Probe]:
    """Draw and run one batch, and encode it with each codec.

    Args:
        job: The job.
        codecs: Codecs of the features, as values of ``--codec``.
        with_student: Whether to measure a training step of a student too, for the break-even.

    Raises:
        DataError: Every image of the batch is corrupt.
    """
    at_most = min(len(job.images), _PROBE_VIEWS, job.batch_size)
    started = time.perf_counter()
    batch = job.drawn.draw(DrawRequest(0, 0, range(at_most)))
    draw_seconds = time.perf_counter() - started
    count = len(batch.keys)
    if not count:
        raise DataError(f"{job.images.location}: every image of the probe is corrupt")
    image_bytes, pixel_seconds = _pixels(job, batch)
    output = None
    teacher_seconds = 0.0
    if job.keeps_targets:
        run_teacher(job.teacher, batch.pixels, job.precision)
        started = time.perf_counter()
        output = run_teacher(job.teacher, batch.pixels, job.precision)
        teacher_seconds = time.perf_counter() - started
    student_seconds = _student_seconds(job, batch.pixels) if with_student and output else 0.0
    for codec in codecs:
        coded = _Coded() if output is None else _coded(job, output, codec)
        planes = coded.num_planes + (job.form.embed == "pixels")
        is_tar = job.form.name == "webdataset"
        columns = len(view_columns(job.drawn.policy)) + 1  # and pixel hashes
        yield Probe(
            teacher_seconds=(teacher_seconds + coded.device_seconds) / count,
            draw_seconds=draw_seconds / count,
            coding_seconds=(coded.seconds + pixel_seconds) / count,
            target_bytes=coded.num_bytes / count,
            image_bytes=image_bytes / count,
            overhead_bytes=job.form.overhead_bytes,
            student_seconds=student_seconds,
            block_size=job.block_size,
            block_files=0 if is_tar else planes,
            shard_size=job.shard_size,
            shard_files=1 + (2 if is_tar else columns),
        )


def probe_disk(folder: Path) -> Disk:
    """Write a large and some small files into a temporary folder inside an existing one."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scalekd-probe-") as temporary:
        started = time.perf_counter()
        for number in range(_DISK_FILES):
            commit_file(Path(temporary) / f"{number}", b"0" * 1000)
        file_seconds = (time.perf_counter() - started) / _DISK_FILES
        content = np.random.default_rng(0).bytes(_DISK_BYTES)
        started = time.perf_counter()
        commit_file(Path(temporary) / "large", content)
        seconds = time.perf_counter() - started
    return Disk(_DISK_BYTES / max(seconds - file_seconds, 1e-3), file_seconds)


@dataclass(frozen=True)
class _Coded:
    """Cost of coding a batch's targets.

    Attributes:
        num_bytes: Compressed bytes.
        seconds: Seconds of one core.
        device_seconds: Seconds of the device, if it encodes.
        num_planes: Number of arrays of all codecs.
    """

    num_bytes: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    num_planes: int = 0


@one_thread()
def _coded(job: Job, output: TeacherArrays, codec: str) -> _Coded:
    """Encode a batch on the device that a run would use, and compress it."""
    request, shapes = parse_codec(codec), job.teacher.spec.stages
    codecs: list[tuple[FeatureCodec | LogitCodec, np.ndarray[Any, Any]]] = [
        (fit_codec(request, shapes[stage], [output.features[stage]]), output.features[stage])
        for stage in job.request.stages
    ]
    if output.logits is not None and job.request.logits != "none":
        logits = create_logit_codec(job.request.logits, output.logits.shape[1])
        codecs.append((logits, output.logits))
    num_bytes = num_planes = 0
    seconds = device_seconds = 0.0
    for each, values in codecs:
        encoder = _device_encoder(each, len(values), job.teacher.device)
        if encoder is not None:
            planes, spent = _encoded(encoder, values, job.teacher.device)
            device_seconds += spent
        started = time.perf_counter()
        if encoder is None:
            planes = each.encode(values)
        packed = each.pack(planes)
        seconds += time.perf_counter() - started
        num_bytes += sum(map(len, packed.values()))
        num_planes += len(packed)
    return _Coded(num_bytes, seconds, device_seconds, num_planes)


def _device_encoder(
    codec: FeatureCodec | LogitCodec, num_views: int, device: torch.device
) -> FeatureEncoder | None:
    """Return the encoder of torch operations, if a run would use it."""
    if default_encoder(device) != "torch" or not isinstance(codec, FeatureCodec):
        return None
    encoder = codec.encoder(num_views)
    return None if encoder is None else encoder.to(device)


def _encoded(
    encoder: FeatureEncoder, values: np.ndarray[Any, Any], device: torch.device
) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
    """Encode features that are on the device; return planes on the host, and the seconds."""
    features = torch.as_tensor(values).to(device)
    with torch.inference_mode():
        encoder(features)  # compiles kernels
        started = time.perf_counter()
        planes = {n: plane.cpu().numpy() for n, plane in encoder(features).planes.items()}
        return planes, time.perf_counter() - started


def _pixels(job: Job, batch: DrawnBatch) -> tuple[int, float]:
    """Return the bytes of a batch's embedded images, and the seconds of one core to make them."""
    if job.form.embed != "pixels":
        return sum(map(len, batch.images)), 0.0
    started = time.perf_counter()
    (array,) = pixel_arrays(job.drawn.view_size)
    num_bytes = len(array.pack(pixel_differences(batch.pixels.numpy())))
    return num_bytes, time.perf_counter() - started


def _student_seconds(job: Job, pixels: Tensor) -> float:
    """Return the seconds per view of a training step of the student, in the job's precision."""
    device = job.teacher.device
    count = min(len(pixels), _STUDENT_VIEWS.get(device.type, 64))
    if count < 2:
        return 0.0  # batch normalisation needs two views
    student = create_student(STUDENT, num_classes=1000, img_size=job.drawn.view_size).model
    student.to(device).train()
    images = pixels[:count].to(device).float().div(255)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    autocast = torch.autocast(
        device.type, AUTOCAST.get(job.precision), enabled=job.precision in AUTOCAST
    )

    def step() -> float:
        started = time.perf_counter()
        with autocast:
            loss = torch.nn.functional.cross_entropy(student(images).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())
        return time.perf_counter() - started

    step()  # chooses kernels
    seconds = [step()]
    while sum(seconds) < _STUDENT_SECONDS and len(seconds) < _MOST_STEPS:
        seconds.append(step())
    return min(seconds) / count
