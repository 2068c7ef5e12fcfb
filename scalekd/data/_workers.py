"""What the loaders of both stages share about worker processes."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def as_is(batch: Any) -> Any:
    """Collate function of datasets that already make whole batches."""
    return batch


def single_threaded(worker: int) -> None:
    """Keep a worker to one core: there is one worker a core already."""
    del worker
    torch.set_num_threads(1)


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a worker's lies in shared memory, so that sending it copies nothing."""
    tensor = torch.empty(shape, dtype=dtype)
    return tensor.share_memory_() if get_worker_info() is not None else tensor
