"""The random states of a process, as plain values that ``torch.load(weights_only=True)`` reads."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, also on accelerators."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": ([int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "accelerator": _accelerator_states(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the result of ``random_state``, of this or another process."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.accelerator.is_available():
        module = torch.get_device_module()
        for index, device_state in enumerate(state["accelerator"][: module.device_count()]):
            module.set_rng_state(device_state, index)


def _accelerator_states() -> list[torch.Tensor]:
    if not torch.accelerator.is_available():
        return []
    module = torch.get_device_module()
    return [module.get_rng_state(index) for index in range(module.device_count())]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states after the block.

    Starting a ``DataLoader`` draws a number from torch's generator; a run that resumes in the
    middle of an epoch starts one more than a run that does not, and must not notice.
    """
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)
