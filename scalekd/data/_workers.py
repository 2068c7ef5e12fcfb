"""What the loaders of both stages share about worker processes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from scalekd.errors import EnvironmentFault, ScaleKDError


def as_is(batch: Any) -> Any:
    """Collate function of datasets that already make whole batches."""
    return batch


def relayed(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches of a loader whose workers return, rather than raise, what went wrong.

    Raises:
        ScaleKDError: What a worker met, or that a worker was killed.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise EnvironmentFault(
                "a worker process was killed, as happens when memory runs out: use fewer workers"
                f" (-j) or smaller batches (-b), and run the same command again ({error})"
            ) from error
        if isinstance(batch, ScaleKDError):
            raise batch
        yield batch


def single_threaded(worker: int) -> None:
    """Keep a worker to one core: there is one worker a core already."""
    del worker
    torch.set_num_threads(1)


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a worker's lies in shared memory, so that sending it copies nothing."""
    tensor = torch.empty(shape, dtype=dtype)
    if get_worker_info() is not None:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor
