"""Worker processes of the loaders of both stages."""

import atexit
import errno
import multiprocessing
import multiprocessing.queues
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from scalekd.errors import EnvironmentFault, ScaleKDError

T = TypeVar("T")

_END = object()
_open: weakref.WeakSet[Any] = weakref.WeakSet()  # this process's iterators over workers
os.register_at_fork(after_in_child=_open.clear)
_MEMORY = (
    "a worker process was killed, as happens when memory runs out: use fewer workers (-j) or"
    " smaller batches (-b)"
)
_FILES = "too many open files: raise the limit (`ulimit -n`), or use fewer workers (-j)"
_WORKER_FAULTS = {
    "unable to allocate shared memory": (
        "shared memory is used up: enlarge /dev/shm (docker: --shm-size), or use fewer workers (-j)"
    ),
    "Too many open files": _FILES,
    "items of ancdata": _FILES,  # too few files while a tensor is received
    f"exit code {errno.EMFILE}.": _FILES,
    "exited unexpectedly": (
        "a worker process ended: memory, or the number of open files (`ulimit -n`), may have run"
        " out; use fewer workers (-j)"
    ),
    "DataLoader worker": _MEMORY,
}
"""Part of a message of torch, and advice for the user; the first match is used."""


def as_is(batch: Any) -> Any:
    """Return a batch unchanged: the collate function of data sets that return whole batches."""
    return batch


def error_as_value(work: Callable[[], T]) -> T | ScaleKDError:
    """Return the result of ``work``, or in a worker its error, which :func:`relayed` raises."""
    try:
        return work()
    except ScaleKDError as error:
        if get_worker_info() is None:
            raise
        return error


def relayed(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader whose workers return errors instead of raising them.

    Raises:
        ScaleKDError: A worker returned an error, or was killed.
    """
    with worker_faults(), _terminations_held():
        batches = iter(loader)
    if loader.num_workers:
        _open.add(batches)
    while True:
        try:
            with worker_faults():
                batch = next(batches, _END)
        except (EOFError, ConnectionError) as error:
            # The worker that announced the batch ended before it sent the memory.
            raise EnvironmentFault(f"{_MEMORY}, and run the same command again") from error
        if batch is _END:
            return
        if isinstance(batch, ScaleKDError):
            raise batch
        yield batch


@atexit.register
def _end_workers() -> None:
    """End the workers of loaders that are still open when the program ends.

    Otherwise multiprocessing sends them one SIGTERM and waits; see :func:`prepare_worker`.
    """
    for batches in list(_open):
        batches._shutdown_workers()


def in_workers(
    dataset: Dataset[Any], requests: Iterable[Any], *, num_workers: int, is_remote: bool
) -> Iterator[Any]:
    """Yield a data set's result for each request, in order, computed in worker processes.

    Raises:
        ScaleKDError: A worker returned an error.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=requests,
        collate_fn=as_is,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=prepare_worker,
        multiprocessing_context=start_method(is_remote=is_remote and num_workers > 0),
    )
    yield from relayed(loader)


@contextmanager
def worker_faults() -> Iterator[None]:
    """Convert errors about a worker of a loader that ended to errors with advice.

    torch raises the error from a signal handler at any point of the main process, even while it
    handles another error, so whole commands run in this context, not only loops over batches.

    Raises:
        EnvironmentFault: A worker was killed, or ran out of files or shared memory.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        advice = next((advice for sign, advice in _WORKER_FAULTS.items() if sign in text), None)
        if advice is None:
            raise
        raise EnvironmentFault(f"{advice}, and run the same command again ({text})") from error


def prepare_worker(worker: int) -> None:
    """Limit a worker to one thread, since each core has a worker, and set its signal handlers.

    A cluster's scheduler sends SIGTERM to every process of a job, and the main process may need
    more batches before it stops. A worker therefore ignores the first SIGTERM and exits silently at
    the second. If only the main process sends SIGTERM, as torch does to a worker that hangs, the
    second comes from multiprocessing when the main process ends (`_end_workers` ensures that the
    first was sent, or that the worker has ended). torch ends workers that outlive the main process.
    """
    del worker
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process as well
    signal.signal(signal.SIGTERM, _exit_at_next)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # _terminations_held
    # By default a batch that cannot be sent is dropped with a traceback, and the main process waits
    # for it permanently. It does notice when a worker ends.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _exit_at_next(number: int, frame: FrameType | None) -> None:
    """Ignore a signal, and exit silently at the next one."""
    del frame
    signal.signal(number, lambda number, frame: os._exit(0))


@contextmanager
def _terminations_held() -> Iterator[None]:
    """Block SIGTERM while workers start; `prepare_worker` unblocks it.

    The fork server also starts with SIGTERM blocked and never unblocks it: if it ended, its workers
    would end too. It ends with the main process.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cannot_send(error: Exception, batch: Any) -> None:
    """End a worker that cannot send a batch, with the number of the error as exit code."""
    del batch
    number = error.errno if isinstance(error, OSError) else None
    if number is None and "Too many open files" in str(error):  # torch's own error
        number = errno.EMFILE
    os._exit(number or 1)


def start_method(*, is_remote: bool) -> str | None:
    """Return the start method of worker processes; ``None`` for the system's default.

    The client of remote stores does not survive a fork (:mod:`scalekd.storage.objects`).
    """
    if not is_remote:
        return None
    multiprocessing.set_forkserver_preload(["scalekd.loading"])  # torch is imported once for all
    resource_tracker.ensure_running()  # started with the fork server, it would unblock SIGTERM
    return "forkserver"


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor; in a worker in shared memory, so that sending is fast."""
    tensor = torch.empty(shape, dtype=dtype)
    if get_worker_info() is not None:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor
