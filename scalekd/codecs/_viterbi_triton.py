# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
# ruff: noqa: ANN001, ANN202 (a kernel has no Python types)
"""The trellis search as one Triton kernel: one thread per lane, its eight costs in registers.

This module needs Triton, which torch installs for CUDA on Linux. Fused multiply-add is switched
off, so that sums round as in NumPy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalekd.codecs._trellis import MACHINE, STEPS

_LANES = 128  # lanes of one program
OPTIONS = {"enable_fp_fusion": False}
_NUM_STEPS = tl.constexpr(STEPS)
# (state, branch) to the state it comes from, three bits each, and to its coset, two bits each.
_PREDECESSORS = tl.constexpr(sum(int(b & 7) << 3 * i for i, b in enumerate(MACHINE.back)))
_COSETS = tl.constexpr(sum(int(b >> 3) << 2 * i for i, b in enumerate(MACHINE.back)))
# Adding and subtracting this rounds to the nearest integer, halves to even, below 2**22.
_ROUND = tl.constexpr(12582912.0)
_FAR = tl.constexpr(1e9)


def search_fused(values: Tensor, weights: Tensor) -> Tensor:
    """Do :func:`scalekd.codecs._viterbi.search` in one kernel."""
    rows, views = values.shape
    width = rows // STEPS * views
    decisions = torch.empty((STEPS, width), dtype=torch.uint8, device=values.device)
    indices = torch.empty((rows, views), dtype=torch.int16, device=values.device)
    if width:
        _search[(triton.cdiv(width, _LANES),)](
            values.contiguous(),
            (weights * 16).contiguous(),
            decisions,
            indices,
            width,
            lanes=_LANES,
            **OPTIONS,
        )
    return indices


@triton.jit
def _best(first, second):
    """Return the cost of the cheaper branch, and whether it is the second."""
    chosen = second < first
    return tl.where(chosen, second, first), chosen.to(tl.int32)


@triton.jit
def _search(values, weights, decisions, indices, width, lanes: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    mask = lane < width
    c0 = tl.zeros((lanes,), tl.float32)
    c1 = c0 + _FAR
    c2, c3, c4, c5, c6, c7 = c1, c1, c1, c1, c1, c1
    for group in range(_NUM_STEPS // 32):
        for inner in range(32):
            step = group * 32 + inner
            weight = tl.load(weights + step)
            value = tl.load(values + step.to(tl.int64) * width + lane, mask=mask, other=0.0)
            # Squared distances to the nearest point of each coset, as in `_trellis.encode`.
            rest = value * 0.25 - 0.125
            rest = rest - ((rest + _ROUND) - _ROUND)
            near = tl.abs(rest)
            other = tl.abs(rest - 0.25)
            other = tl.minimum(other, 1.0 - other)
            near_2, other_2 = 0.5 - near, 0.5 - other
            d0 = near * near * weight
            d1 = other * other * weight
            d2 = near_2 * near_2 * weight
            d3 = other_2 * other_2 * weight
            # Branches into each state: `_trellis.MACHINE`.
            n0, b0 = _best(c0 + d0, c1 + d2)
            n1, b1 = _best(c6 + d3, c7 + d1)
            n2, b2 = _best(c0 + d2, c1 + d0)
            n3, b3 = _best(c6 + d1, c7 + d3)
            n4, b4 = _best(c2 + d0, c3 + d2)
            n5, b5 = _best(c4 + d3, c5 + d1)
            n6, b6 = _best(c2 + d2, c3 + d0)
            n7, b7 = _best(c4 + d1, c5 + d3)
            c0, c1, c2, c3, c4, c5, c6, c7 = n0, n1, n2, n3, n4, n5, n6, n7
            bits = b0 | (b1 << 1) | (b2 << 2) | (b3 << 3)
            bits = bits | (b4 << 4) | (b5 << 5) | (b6 << 6) | (b7 << 7)
            target = decisions + step.to(tl.int64) * width + lane
            tl.store(target, bits.to(tl.uint8), mask=mask)
        # Costs only grow; keep float32 exact enough.
        least = tl.minimum(tl.minimum(c0, c1), tl.minimum(c2, c3))
        least = tl.minimum(least, tl.minimum(tl.minimum(c4, c5), tl.minimum(c6, c7)))
        c0, c1, c2, c3 = c0 - least, c1 - least, c2 - least, c3 - least
        c4, c5, c6, c7 = c4 - least, c5 - least, c6 - least, c7 - least
    # The cheapest state, the first of equals.
    state = tl.zeros((lanes,), tl.int32)
    best, better = c0, c1 < c0
    state, best = tl.where(better, 1, state), tl.where(better, c1, best)
    better = c2 < best
    state, best = tl.where(better, 2, state), tl.where(better, c2, best)
    better = c3 < best
    state, best = tl.where(better, 3, state), tl.where(better, c3, best)
    better = c4 < best
    state, best = tl.where(better, 4, state), tl.where(better, c4, best)
    better = c5 < best
    state, best = tl.where(better, 5, state), tl.where(better, c5, best)
    better = c6 < best
    state, best = tl.where(better, 6, state), tl.where(better, c6, best)
    state = tl.where(c7 < best, 7, state)
    tl.debug_barrier()  # decisions may be read by another thread than the one that wrote them
    predecessors = tl.full((lanes,), _PREDECESSORS, tl.int64)
    cosets = tl.full((lanes,), _COSETS, tl.int64)
    for back in range(_NUM_STEPS):
        step = _NUM_STEPS - 1 - back
        offset = step.to(tl.int64) * width + lane
        bits = tl.load(decisions + offset, mask=mask, other=0).to(tl.int32)
        entry = 2 * state + ((bits >> state) & 1)
        coset = ((cosets >> (2 * entry).to(tl.int64)) & 3).to(tl.int32)
        value = tl.load(values + offset, mask=mask, other=0.0)
        period = (value - (coset.to(tl.float32) + 0.5)) * 0.25
        period = ((period + _ROUND) - _ROUND).to(tl.int32)
        index = (2 * period + ((coset + 1) >> 1)) * (1 - 2 * (coset & 1))
        tl.store(indices + offset, index.to(tl.int16), mask=mask)
        state = ((predecessors >> (3 * entry).to(tl.int64)) & 7).to(tl.int32)
