"""The trellis search on an accelerator: the same paths as :func:`scalekd.codecs._trellis.encode`.

Every operation is elementwise over the paths and rounds as in NumPy, so that the indices are equal
to NumPy's. With Triton the whole search is one kernel; otherwise it is about 25
torch operations per step. :func:`search` chooses between the two.
"""

import importlib.util
import warnings
from functools import cache

import numpy as np
import torch
from torch import Tensor

from scalekd.codecs._trellis import MACHINE, STEPS

_STATES = 8
_FAR = 1e9  # cost of the states in which no path starts


def search(values: Tensor, weights: Tensor) -> Tensor:
    """Find the cheapest path through every lane.

    Args:
        values: float32 ``(STEPS * lanes, view)`` in units of the fine step, contiguous.
        weights: float32 ``(STEPS,)``, the weight of squared distances in each slab.

    Returns:
        int16 indices of the same shape.
    """
    if values.device.type == "cuda" and _can_fuse(values.device.type):
        from scalekd.codecs._viterbi_triton import search_fused

        return search_fused(values, weights)
    return search_stepwise(values, weights)


@cache
def _can_fuse(device: str) -> bool:
    """Return whether Triton can build the kernel, which needs a C compiler, and it is correct.

    The kernel is compiled for the present device, so each process compares it once with the torch
    operations that it replaces.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    generator = torch.Generator().manual_seed(0)
    values = (4 * torch.randn(4 * STEPS, 64, generator=generator)).to(device)
    weights = (1 + torch.rand(STEPS, generator=generator)).to(device)
    try:
        from scalekd.codecs._viterbi_triton import search_fused

        fused = search_fused(values, weights)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    else:
        num_different = int((fused != search_stepwise(values, weights)).sum())
        if not num_different:
            return True
        reason = f"{num_different} of {values.numel()} of its indices differ from torch's"
    warnings.warn(
        f"the Triton kernel of the encoder is not used, so that encoding is slower: {reason[:200]}",
        stacklevel=2,
    )
    return False


def search_stepwise(values: Tensor, weights: Tensor) -> Tensor:
    """Do :func:`search` with torch operations, on any device."""
    rows, views = values.shape
    width, device = rows // STEPS * views, values.device
    slabs = values.reshape(STEPS, width)
    predecessor, coset_of, back_of = (
        torch.from_numpy(table.astype(np.int64)).to(device)
        for table in (MACHINE.predecessor, MACHINE.coset, MACHINE.back)
    )
    scaled = weights * 16
    cost = torch.full((_STATES, width), _FAR, device=device)
    cost[0] = 0
    decisions = torch.empty((STEPS, _STATES, width), dtype=torch.bool, device=device)
    for step in range(STEPS):
        remainder = slabs[step] * 0.25 - 0.125
        remainder -= remainder.round()
        near = remainder.abs()
        other = (remainder - 0.25).abs()
        other = torch.minimum(other, 1 - other)
        distance = torch.stack([near, other, 0.5 - near, 0.5 - other]).square_() * scaled[step]
        first = cost[predecessor[:, 0]] + distance[coset_of[:, 0]]
        second = cost[predecessor[:, 1]] + distance[coset_of[:, 1]]
        torch.lt(second, first, out=decisions[step])
        cost = torch.minimum(first, second)
        if step % 32 == 31:
            cost -= cost.amin(dim=0)
    state = cost.argmin(dim=0)
    indices = torch.empty((STEPS, width), dtype=torch.int16, device=device)
    for step in range(STEPS - 1, -1, -1):
        branch = decisions[step].gather(0, state[None])[0].long()
        back = back_of[2 * state + branch]
        coset = back >> 3
        period = ((slabs[step] - (coset + 0.5)) * 0.25).round().long()
        indices[step] = (2 * period + ((coset + 1) >> 1)) * (1 - 2 * (coset & 1))
        state = back & 7
    return indices.reshape(rows, views)
