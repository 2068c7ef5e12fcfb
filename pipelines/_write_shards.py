"""Shards: views drawn, sent through the teacher, coded and committed."""

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalekd.cache.records import has_record
from scalekd.cache.targets import CacheCodecs
from scalekd.cache.writer import CacheWriter, SampleRows, ViewRows
from scalekd.errors import DataError
from scalekd.loading.drawing import (
    DrawnBatch,
    DrawnViews,
    DrawRequest,
    drawing_loader,
    shard_requests,
)
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._progress import ProgressReport
from scalekd.teachers import Teacher
from scalekd.threads import one_blas_thread
from scalekd.views import ViewParams, ViewPolicy, pack_views

Planes = dict[str, np.ndarray[Any, Any]]
_MOST_THREADS = 16  # each holds a batch of features
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherArrays:
    """A teacher's output on the host, float32."""

    features: dict[int, np.ndarray[Any, Any]]
    logits: np.ndarray[Any, Any] | None


def run_teacher(teacher: Teacher, pixels: Tensor, precision: str) -> TeacherArrays:
    """One forward in the precision asked for."""
    device = teacher.mean.device
    autocast = torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)
    with torch.inference_mode(), autocast:
        output = teacher(pixels.to(device, non_blocking=True))
    logits = None if output.logits is None else output.logits.float().cpu().numpy()
    return TeacherArrays(
        {stage: found.float().cpu().numpy() for stage, found in output.features.items()}, logits
    )


def num_coding_threads() -> int:
    """Threads of this process that code beside the teacher: its share of the cores, at least two.

    A core codes some hundred views a second, a GPU's teacher says more; the bytes are the same
    with any number.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(max(2, (cores or 1) // processes - 1), _MOST_THREADS)


def _claimed_requests(
    writer: CacheWriter, shards: Iterable[tuple[int, int]]
) -> Iterator[DrawRequest]:
    """Batches of shards, each shard claimed when its first batch is asked for."""
    identity = writer.plan.identity
    for pass_index, shard in shards:
        if writer.claim(pass_index, shard):
            yield from shard_requests(
                [(pass_index, shard)],
                num_samples=identity.data.num_samples,
                shard_size=identity.shard_size,
                batch_size=identity.batch_size,
            )


@one_blas_thread()
def write_claimed(
    config: CacheTeacherConfig,
    writer: CacheWriter,
    codecs: CacheCodecs,
    teacher: Teacher,
    drawn: DrawnViews,
    shards: Iterable[tuple[int, int]],
    progress: ProgressReport,
) -> int:
    """Draw, run the teacher, code and commit, shard by shard; returns the number committed."""
    missing = [pair for pair in shards if not has_record(writer.place, *pair)]
    if not missing:
        return 0
    requests = _claimed_requests(writer, missing)
    batches = drawing_loader(drawn, requests, num_workers=config.workers)
    shard: _OpenShard | None = None
    num_committed = 0
    while True:
        waiting = time.monotonic()
        batch = next(batches, None)
        progress.waited_seconds += time.monotonic() - waiting
        if batch is None:
            return num_committed
        request = batch.request
        if shard is None:
            shard = _OpenShard(writer, codecs, request)
        if batch.keys:
            shard.add(batch, run_teacher(teacher, batch.pixels, config.precision))
        shard.skipped.extend(batch.skipped)
        if request.last:
            shard.commit()
            shard = None
            num_committed += 1
        progress.advance(len(batch.keys))


@dataclass(frozen=True)
class _Encoding:
    """Part of a batch that the writer's threads are coding, or have coded."""

    planes: Future[Planes]
    rows: slice


@dataclass(frozen=True)
class _Drawn:
    """What is kept of one view until its block is full."""

    key: str
    label: int
    source_hash: int
    params: ViewParams
    pixel_hash: int
    image: bytes | None


class _OpenShard:
    """Codes batches as they come, and joins them into blocks.

    A commit waits for what is not yet coded while the teacher stands still, so coding does not wait
    for a block to be full.
    """

    def __init__(self, writer: CacheWriter, codecs: CacheCodecs, request: DrawRequest) -> None:
        self._codecs = codecs
        self._block_size = writer.plan.identity.block_size
        self._policy = ViewPolicy.from_config(writer.plan.identity.views.policy)
        self._place = f"pass {request.pass_index}, shard {request.shard}"
        self._writer = writer.shard(request.pass_index, request.shard)
        self._pool = writer.pool
        self._view_axes = {array.name: array.view_axis for array in writer.layout.views}
        self._drawn: list[_Drawn] = []
        self._waiting: deque[_Encoding] = deque()
        self.skipped: list[str] = []

    def add(self, batch: DrawnBatch, output: TeacherArrays) -> None:
        """Take a batch; write every block that is full."""
        self._drawn += map(
            _Drawn,
            batch.keys,
            batch.labels.tolist(),
            batch.source_hashes.tolist(),
            batch.params,
            batch.pixel_hashes.tolist(),
            batch.images or itertools.repeat(None),
        )
        planes = self._pool.submit(self._encode, batch.keys, output)
        self._waiting.append(_Encoding(planes, slice(0, len(batch.keys))))
        while len(self._drawn) >= self._block_size:
            self._write_block(self._block_size)

    def commit(self) -> None:
        """Write the last block and commit the shard."""
        if self._drawn:
            self._write_block(len(self._drawn))
        self._writer.commit(self.skipped)

    def _encode(self, keys: tuple[str, ...], output: TeacherArrays) -> Planes:
        arrays: Planes = {}
        try:
            for stage, codec in self._codecs.stages.items():
                for name, plane in codec.encode(output.features[stage]).items():
                    arrays[f"stage{stage}/{name}"] = plane
            if output.logits is not None and self._codecs.logits:
                for name, plane in self._codecs.logits.encode(output.logits).items():
                    arrays[f"logits/{name}"] = plane
        except DataError as error:
            raise DataError(
                f"{self._place}, views of samples {keys[0]} to {keys[-1]}: {error}"
            ) from error
        return arrays

    def _write_block(self, count: int) -> None:
        """Queue the first ``count`` views that wait; what is left of a batch goes on waiting."""
        block, self._drawn = self._drawn[:count], self._drawn[count:]
        parts, missing = [], count
        while missing:
            part = self._waiting.popleft()
            start, end = part.rows.start, part.rows.stop
            cut = min(end, start + missing)
            parts.append(_Encoding(part.planes, slice(start, cut)))
            if cut < end:
                self._waiting.appendleft(_Encoding(part.planes, slice(cut, end)))
            missing -= cut - start

        def joined() -> Planes:
            # Queued behind what it waits for, so that threads of one pool may wait for each other.
            found = [(part.planes.result(), part.rows) for part in parts]
            return {
                name: np.concatenate(
                    [
                        planes[name][(slice(None),) * self._view_axes[name] + (rows,)]
                        for planes, rows in found
                    ],
                    axis=self._view_axes[name],
                )
                for name in found[0][0]
            }

        self._writer.write_block(joined, self._rows(block))

    def _rows(self, block: list[_Drawn]) -> ViewRows:
        columns = pack_views([view.params for view in block], self._policy)
        images = tuple(view.image for view in block if view.image is not None)
        return ViewRows(
            samples=SampleRows(
                keys=tuple(view.key for view in block),
                labels=np.array([view.label for view in block], np.int32),
                source_hashes=np.array([view.source_hash for view in block], np.uint64),
            ),
            columns={f"view/{name}": rows for name, rows in columns.items()}
            | {"pixel_hash": np.array([view.pixel_hash for view in block], np.uint64)},
            images=images or None,
        )
