"""Copies batches to the device, one batch ahead of the computation."""

from collections.abc import Iterator

import torch

from scalekd.distributed import Coordinator
from scalekd.errors import UsageError
from scalekd.training.interfaces import EpochLoader
from scalekd.training.targets import Batch
from scalekd.views import undo_differences


def num_batches(loader: EpochLoader, coordinator: Coordinator, batch_size: int) -> int:
    """Return the number of batches of an epoch, which must be the same on every process.

    Raises:
        UsageError: The numbers differ, or an epoch has no full batch.
    """
    number = loader.num_batches
    if coordinator.maximum(number) + coordinator.maximum(-number):
        raise UsageError(
            f"the processes would train different numbers of batches ({number} here); every "
            "process must read the same data set with the same --batch-size"
        )
    if not number:
        raise UsageError(
            f"an epoch has no full batch of {batch_size} views for each of "
            f"{coordinator.num_processes} processes; give a smaller --batch-size"
        )
    return number


def on_device(
    batches: Iterator[Batch], device: torch.device, *, ahead: int | None = None
) -> Iterator[Batch]:
    """Move batches to a device, and restore pixels from ``differences`` there.

    On CUDA each batch is copied on a separate stream while the previous one is trained on. If the
    loader pins its memory, the host does not wait for the copy. An error of the loader is raised
    only after all earlier batches were returned.

    Args:
        batches: Batches of the loader.
        device: Device to copy to.
        ahead: Batches to copy before they are needed; 1 on CUDA and 0 elsewhere by default.
    """
    stream = (
        torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if device.type == "cuda"
        else None
    )
    ahead = (1 if stream is not None else 0) if ahead is None else ahead
    waiting: list[tuple[Batch, torch.cuda.Event | None]] = []
    failure: Exception | None = None
    ended = False
    while True:
        while not ended and len(waiting) <= ahead:
            try:
                batch = next(batches, None)
            except Exception as error:
                batch, failure = None, error
            if batch is None:
                ended = True
            else:
                waiting.append(_copy(batch, device, stream))
        if not waiting:
            break
        copied, arrived = waiting.pop(0)
        if arrived is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(arrived)
            for tensor in copied.values():
                tensor.record_stream(current)
        yield copied
    if failure is not None:
        raise failure


def _copy(
    batch: Batch, device: torch.device, stream: torch.cuda.Stream | None
) -> tuple[Batch, torch.cuda.Event | None]:
    if stream is None:
        return _moved(batch, device), None
    with torch.cuda.stream(stream):
        return _moved(batch, device), stream.record_event()


def _moved(batch: Batch, device: torch.device) -> Batch:
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if "differences" in moved:
        moved["pixels"] = undo_differences(moved.pop("differences"))
    return moved
