"""Write shards: draw views, run the teacher, encode its outputs and commit."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from scalekd.cache.codecs import CacheCodecs
from scalekd.cache.layout import DIFFERENCES
from scalekd.cache.writing.rows import SampleRows, ViewRows
from scalekd.cache.writing.shard_writer import OpenBlock
from scalekd.cache.writing.writer import CacheWriter
from scalekd.codecs import FeatureCodec, LogitCodec
from scalekd.errors import DataError
from scalekd.loading.drawing import (
    DrawnBatch,
    DrawRequest,
    drawing_loader,
    shard_requests,
)
from scalekd.pipelines._arithmetic import num_cores, strict_float32
from scalekd.pipelines._classes import TeacherAnswers
from scalekd.pipelines._job import Job
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._teacher_stream import (
    EncoderName,
    HostBatch,
    Planes,
    TeacherArrays,
    TeacherStream,
    as_array,
    default_encoder,
    teacher_outputs,
)
from scalekd.teachers import Teacher
from scalekd.threads import one_blas_thread
from scalekd.views import ViewParams, ViewPolicy, pack_views, pixel_differences

_MOST_THREADS = 16
# Enough views to make the overhead of a call small, and few enough that one batch occupies many
# threads and the last batch of a run is encoded quickly.
_LEAST_TASK_VIEWS = 8


def run_teacher(teacher: Teacher, pixels: Tensor, precision: str) -> TeacherArrays:
    """Run one forward pass in ``precision``; return float32 arrays on the host."""
    output = teacher_outputs(teacher, pixels.to(teacher.device), precision)
    logits = None if output.logits is None else output.logits.float().cpu().numpy()
    return TeacherArrays(
        {stage: values.float().cpu().numpy() for stage, values in output.features.items()}, logits
    )


def num_coding_threads() -> int:
    """Return the number of encoding threads: this process's share of the cores, at least two.

    A core encodes about a hundred views per second, fewer than a teacher on a GPU produces. The
    written bytes do not depend on the number of threads.
    """
    return min(max(2, num_cores() - 1), _MOST_THREADS)


def _claimed_requests(
    writer: CacheWriter, shards: Iterable[tuple[int, int]]
) -> Iterator[DrawRequest]:
    """Yield the batches of shards; a shard is claimed when its first batch is requested."""
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
@strict_float32()
def write_claimed(
    job: Job,
    writer: CacheWriter,
    codecs: CacheCodecs,
    shards: Iterable[tuple[int, int]],
    progress: ProgressReport,
    answers: TeacherAnswers | None = None,
    *,
    encoder: EncoderName | None = None,
) -> int:
    """Draw, run the teacher, encode and commit, shard by shard; return the number committed.

    Threads encode while the teacher runs, and a shard is committed while the next is drawn.

    Args:
        job: The job, its teacher on its device.
        writer: Writer of the cache.
        codecs: Codecs of the cache.
        shards: ``(pass, shard)`` pairs.
        progress: Counts the views.
        answers: Counts how often the teacher answers with the label.
        encoder: Implementation that encodes features; the default of the device when ``None``.
    """
    missing = [pair for pair in shards if not writer.has_record(*pair)]
    if not missing:
        return 0
    stream = TeacherStream(
        job.teacher,
        codecs,
        job.precision,
        writer.plan.identity.batch_size,
        encoder or default_encoder(job.teacher.device),
        lambda pixels: run_teacher(job.teacher, pixels, job.precision),
    )
    requests = _claimed_requests(writer, missing)
    batches = drawing_loader(job.drawn, requests, num_workers=job.workers)
    shards_in_order = _Shards(writer, codecs)
    started: deque[tuple[DrawnBatch, Callable[[], HostBatch]]] = deque()
    while True:
        waiting = time.monotonic()
        batch = next(batches, None)
        progress.waited_seconds += time.monotonic() - waiting
        if batch is not None:
            writer.in_flight.enter(len(batch.keys))
            started.append((batch, stream.start(batch.pixels) if batch.keys else HostBatch))
        while started and (batch is None or len(started) > stream.num_behind):
            done, wait = started.popleft()
            output = wait()
            shards_in_order.add(done, output)
            if answers is not None and output.logits is not None:
                answers.add(as_array(output.logits), done.labels)
            progress.advance(len(done.keys))
        if batch is None:
            writer.settle()
            return shards_in_order.num_committed


class _Shards:
    """Opens a shard at its first batch, and commits it in the background after its last."""

    def __init__(self, writer: CacheWriter, codecs: CacheCodecs) -> None:
        self._writer = writer
        self._codecs = codecs
        self._open: _OpenShard | None = None
        self.num_committed = 0

    def add(self, batch: DrawnBatch, output: HostBatch) -> None:
        """Take the next batch."""
        if self._open is None:
            self._open = _OpenShard(self._writer, self._codecs, batch.request)
        if batch.keys:
            self._open.add(batch, output)
        self._open.skipped.extend(batch.skipped)
        if batch.request.last:
            self._open.commit_behind()
            self._open = None
            self.num_committed += 1


def _encoded(
    codec: FeatureCodec | LogitCodec, values: np.ndarray[Any, Any] | Tensor, prefix: str
) -> Planes:
    return {f"{prefix}/{name}": plane for name, plane in codec.encode(as_array(values)).items()}


def _from_device(planes: Callable[[], Planes], prefix: str) -> Planes:
    return {f"{prefix}/{name}": plane for name, plane in planes().items()}


def _differences(pixels: np.ndarray[Any, Any]) -> Planes:
    return {DIFFERENCES: pixel_differences(pixels)}


@dataclass(frozen=True)
class _Piece:
    """The views of a batch that lie in one block.

    Attributes:
        block: The block.
        start: Index of the first view in the batch.
        stop: Index after the last view in the batch.
        row: Index of the first view in the block.
    """

    block: OpenBlock
    start: int
    stop: int
    row: int


@dataclass(frozen=True)
class _Drawn:
    """Data of one view, kept until its block is full."""

    key: str
    label: int
    source_hash: int
    params: ViewParams
    pixel_hash: int
    image: bytes | None


class _OpenShard:
    """Divides batches into encoding tasks, and collects their planes in blocks."""

    def __init__(self, writer: CacheWriter, codecs: CacheCodecs, request: DrawRequest) -> None:
        self._codecs = codecs
        self._block_size = writer.plan.identity.block_size
        self._policy = ViewPolicy.from_config(writer.plan.identity.views.policy)
        self._where = f"pass {request.pass_index}, shard {request.shard}"
        self._commit_behind = writer.commit_behind
        self._writer = writer.shard(request.pass_index, request.shard)
        self._block: OpenBlock | None = None
        self._drawn: list[_Drawn] = []
        self.skipped: list[str] = []

    def add(self, batch: DrawnBatch, output: HostBatch) -> None:
        """Queue the encoding of a batch; full blocks are written once they are encoded."""
        num_views = len(batch.keys)
        pieces = self._pieces(num_views)
        for encode, start, stop in itertools.chain(
            self._tasks(output, num_views), self._pixel_tasks(batch.pixels)
        ):
            self._queue(batch.keys, encode, start, stop, pieces)
        images = batch.images or itertools.repeat(None)
        drawn = map(
            _Drawn,
            batch.keys,
            batch.labels.tolist(),
            batch.source_hashes.tolist(),
            batch.params,
            batch.pixel_hashes.tolist(),
            images,
        )
        for piece in pieces:
            self._drawn += itertools.islice(drawn, piece.stop - piece.start)
            if len(self._drawn) == self._block_size:
                self._seal(piece.block)

    def commit_behind(self) -> None:
        """Write the last block and commit the shard, in the background."""
        if self._block is not None:
            self._seal(self._block)
        self._commit_behind(self._writer, self.skipped)

    def _pieces(self, num_views: int) -> list[_Piece]:
        """Divide a batch among blocks, and open new blocks as needed."""
        pieces, start, row = [], 0, len(self._drawn)
        while start < num_views:
            if self._block is None:
                self._block = self._writer.open_block()
            stop = min(num_views, start + self._block_size - row)
            pieces.append(_Piece(self._block, start, stop, row))
            row += stop - start
            start = stop
            if row == self._block_size:
                self._block, row = None, 0
        return pieces

    def _tasks(
        self, output: HostBatch, num_views: int
    ) -> Iterator[tuple[Callable[[], Planes], int, int]]:
        """Yield encoding tasks: a function that returns planes, and its views ``start:stop``."""
        for stage, codec in self._codecs.stages.items():
            if stage in output.planes:
                yield partial(_from_device, output.planes[stage], f"stage{stage}"), 0, num_views
                continue
            features = output.features[stage]
            step = codec.views_at_once * -(-_LEAST_TASK_VIEWS // codec.views_at_once)
            for start in range(0, len(features), step):
                part = features[start : start + step]
                yield partial(_encoded, codec, part, f"stage{stage}"), start, start + len(part)
        if output.logits is not None and self._codecs.logits:
            encode = partial(_encoded, self._codecs.logits, output.logits, "logits")
            yield encode, 0, len(output.logits)

    def _pixel_tasks(self, pixels: Tensor) -> Iterator[tuple[Callable[[], Planes], int, int]]:
        """Yield the tasks that compute differences of pixels, if they are embedded."""
        if self._writer.layout.form.embed != "pixels":
            return
        for start in range(0, len(pixels), _LEAST_TASK_VIEWS):
            part = pixels[start : start + _LEAST_TASK_VIEWS].numpy()
            yield partial(_differences, part), start, start + len(part)

    def _queue(
        self,
        keys: tuple[str, ...],
        encode: Callable[[], Planes],
        start: int,
        stop: int,
        pieces: list[_Piece],
    ) -> None:
        """Run an encoding task in a thread, which adds the planes to their blocks."""
        pieces = [piece for piece in pieces if piece.start < stop and start < piece.stop]
        for piece in pieces:
            piece.block.expect()

        def work() -> None:
            try:
                planes = encode()
            except DataError as error:
                raise DataError(
                    f"{self._where}, views of samples {keys[start]} to {keys[stop - 1]}: {error}"
                ) from error
            for piece in pieces:
                first, end = max(start, piece.start), min(stop, piece.stop)
                rows = slice(first - start, end - start)
                piece.block.put(piece.row + first - piece.start, self._rows_of(planes, rows))

        self._writer.run(work, [piece.block for piece in pieces])

    def _rows_of(self, planes: Planes, rows: slice) -> Planes:
        axes = {name: self._writer.layout.find(name).view_axis for name in planes}
        return {
            name: plane[(slice(None),) * axes[name] + (rows,)] for name, plane in planes.items()
        }

    def _seal(self, block: OpenBlock) -> None:
        drawn, self._drawn = self._drawn, []
        self._writer.seal_block(block, self._rows(drawn))

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
