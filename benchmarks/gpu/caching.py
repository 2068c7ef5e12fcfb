"""Stage one: the bare teacher, its stream without drawing and writing, and the whole command."""

import contextlib
import resource
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu._setting import Setting, image_folder, milliseconds, ready_codec
from scalekd.cache.codecs import CacheCodecs
from scalekd.codecs import CodecRequest, FullLogitCodec
from scalekd.pipelines import _calibrate, _write_shards
from scalekd.pipelines._arithmetic import auto_precision, strict_float32
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._teacher_stream import (
    EncoderName,
    HostBatch,
    TeacherStream,
    default_encoder,
    teacher_outputs,
)
from scalekd.pipelines.cache_teacher import cache_teacher
from scalekd.shapes import FeatureShape
from scalekd.teachers import Teacher


def run(setting: Setting) -> None:
    teacher = setting.load_teacher()
    precision = auto_precision(setting.device)
    bare: list[float] = []
    with strict_float32():
        setting.part("caching", "teacher", lambda: bare.extend(_teacher(setting, teacher)))
        for stages in ((4,), (3, 4)):
            setting.part(
                "caching",
                f"stream {stages}",
                lambda stages=stages: _stream(setting, teacher, precision, stages),  # type: ignore[misc]
                needs=15,
            )
    del teacher
    for name, stages in (("both", (3, 4)), ("final", (4,))):
        setting.part(
            "caching",
            f"end to end, {name}",
            lambda name=name, stages=stages: _end_to_end(setting, name, stages, bare[:1]),  # type: ignore[misc]
            needs=20,
        )


def _pixels(setting: Setting, count: int) -> torch.Tensor:
    size = (count, setting.img_size, setting.img_size, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8).permute(0, 3, 1, 2)


def _teacher(setting: Setting, teacher: Teacher) -> list[float]:
    """Views a second of the forward alone, pixels on the device; the default precision first."""
    pixels = _pixels(setting, setting.batch_size).to(setting.device)
    rates = []
    precisions = dict.fromkeys((auto_precision(setting.device), "fp32"))
    for precision in precisions:
        cost = milliseconds(
            lambda p=precision: teacher_outputs(teacher, pixels, p), tiny=setting.tiny
        )  # type: ignore[misc]
        rates.append(len(pixels) / cost * 1e3)
        setting.report(
            "caching",
            part="teacher",
            precision=precision,
            batch=len(pixels),
            views_per_second=round(rates[-1]),
        )
    return rates


def _stream(setting: Setting, teacher: Teacher, precision: str, stages: tuple[int, ...]) -> None:
    """From pixels in pageable memory to planes on the host, without drawing and writing."""
    codecs = CacheCodecs(
        {stage: ready_codec(setting, stage) for stage in stages},
        FullLogitCodec(teacher.spec.num_classes or 1),
    )
    encoder: EncoderName = default_encoder(setting.device)
    stream = TeacherStream(
        teacher,
        codecs,
        precision,
        setting.batch_size,
        encoder,
        lambda pixels: _write_shards.run_teacher(teacher, pixels, precision),
    )
    pixels = _pixels(setting, setting.batch_size)

    def batches(count: int) -> float:
        started: deque[Callable[[], HostBatch]] = deque()
        begun = time.perf_counter()
        for _ in range(count):
            started.append(stream.start(pixels))
            if len(started) > stream.num_behind:
                started.popleft()()
        while started:
            started.popleft()()
        return time.perf_counter() - begun

    batches(2)
    count = 2 if setting.tiny else 40
    cpu = time.thread_time()
    seconds = batches(count)
    num_views = count * setting.batch_size
    setting.report(
        "caching",
        part="stream",
        stages=stages,
        encoder=encoder,
        precision=precision,
        views_per_second=round(num_views / seconds),
        main_thread_ms_a_view=round((time.thread_time() - cpu) / num_views * 1e3, 3),
    )


@contextlib.contextmanager
def ready_codecs(setting: Setting) -> Iterator[None]:
    """Let calibration draw few views, and take codecs that were fitted before."""

    def fit(request: Any, shape: FeatureShape, blocks: Any, **more: Any) -> Any:
        del request, blocks, more
        stage = next(stage for stage, known in setting.shapes.items() if known == shape)
        return ready_codec(setting, stage)

    with (
        mock.patch.object(_calibrate, "fit_codec", fit),
        mock.patch.object(CodecRequest, "num_calibration_views", return_value=64),
    ):
        yield


class _Marks(ProgressReport):
    """Remembers when how many views were done."""

    marks: list[tuple[float, int]]

    def advance(self, count: int) -> None:
        super().advance(count)
        self.marks.append((time.perf_counter(), self.done))

    def steady_rate(self) -> float:
        """Views a second between a quarter and the end: workers take seconds to start."""
        first = next(mark for mark in self.marks if mark[1] >= self.done / 4)
        last = self.marks[-1]
        return (last[1] - first[1]) / max(last[0] - first[0], 1e-9)


def _end_to_end(setting: Setting, name: str, stages: tuple[int, ...], bare: list[float]) -> None:
    output = setting.work / f"cache-{name}"
    shutil.rmtree(output, ignore_errors=True)
    config = CacheTeacherConfig(
        teacher=setting.teacher,
        data_dir=str(image_folder(setting)),
        output=output,
        stages=stages,  # type: ignore[arg-type]
        aug="crop+flip",
        batch_size=setting.batch_size,
        workers=setting.num_workers,
        shard_size=32 if setting.tiny else 4096,
    )
    reports: list[_Marks] = []

    def noted(*args: Any, **kwargs: Any) -> _Marks:
        report = _Marks(*args, **kwargs)
        report.marks = []
        reports.append(report)
        return report

    before = resource.getrusage(resource.RUSAGE_SELF)
    with ready_codecs(setting), mock.patch("scalekd.pipelines.cache_teacher.ProgressReport", noted):
        result = cache_teacher(config)
    after = resource.getrusage(resource.RUSAGE_SELF)
    rate = reports[-1].steady_rate()
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    setting.report(
        "caching",
        part="end to end",
        stages=stages,
        views=result.views_written,
        views_per_second=round(rate),
        views_per_second_with_start=round(result.views_per_second),
        over_bare=round(bare[0] / rate, 3) if bare else None,
        data_wait_share=round(result.data_wait_share, 3),
        processor_ms_a_view=round(seconds / max(1, result.views_written) * 1e3, 2),
        threads=_write_shards.num_coding_threads(),
        workers=setting.num_workers,
        bytes_a_view=round(result.bytes_per_view or 0),
        complete=result.complete,
    )
