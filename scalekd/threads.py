"""Limits on the threads of numerical libraries.

Several threads add up a sum in another order, so that its last bits depend on the number of
threads. That number differs between a plain run and ``torchrun``, and between machines.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from threadpoolctl import ThreadpoolController, threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside the block, in torch and in every BLAS and OpenMP library.

    Results inside do not depend on ``OMP_NUM_THREADS`` or the number of cores.
    """
    num_threads = torch.get_num_threads()
    try:
        with threadpool_limits(limits=1):
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit NumPy's and SciPy's BLAS to one thread inside the block, in the whole process.

    Threads that encode in parallel would otherwise each start one BLAS thread per core. torch keeps
    its own threads, because the teacher's forward pass uses them.
    """
    controller = ThreadpoolController()
    paths = [
        library["filepath"]
        for library in controller.info()
        if library["user_api"] == "blas" and "torch" not in Path(library["filepath"]).parts
    ]
    with controller.select(filepath=paths).limit(limits=1):
        yield
