"""Weights from a file, without ever running code that the file holds.

A checkpoint is safetensors, or a PyTorch file read with ``weights_only=True``. Its names and
shapes must be the model's; what differs is listed on both sides.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.errors import DataError, UsageError

# Tables that models compute from their own configuration; old checkpoints stored them.
_COMPUTED_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_MAX_LISTED = 6


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors; an averaged (EMA) set is preferred where the file has one.

    Prefixes left by ``torch.compile`` and DDP are removed.

    Raises:
        UsageError: No such file.
        DataError: The file is damaged, needs unpickling, or holds no named tensors.
    """
    from timm.models import load_state_dict

    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--checkpoint {path}: there is no such file")
    try:
        state = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"--checkpoint {path} is damaged, or holds pickled objects besides tensors, which are "
            f"never loaded; a state dict saved as safetensors is ({reason[0][:160]})"
        ) from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(f"--checkpoint {path} holds no named tensors")
    return {name: value for name, value in tensors.items() if not _is_computed(name)}


def matches(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` has exactly the names and shapes of ``model``'s own state dict."""
    expected = _shapes(model.state_dict())
    return expected == _shapes(state)


def describe_mismatch(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """List the names and shapes in which two state dicts differ, a few of each kind."""
    want, have = _shapes(expected), _shapes(found)
    missing = [f"{name} {want[name]}" for name in want if name not in have]
    extra = [f"{name} {have[name]}" for name in have if name not in want]
    other = [
        f"{name} {have[name]} in the file, {want[name]} in the model"
        for name in want
        if name in have and want[name] != have[name]
    ]
    kinds = [("only in the model", missing), ("only in the file", extra), ("shapes differ", other)]
    return "; ".join(f"{kind}: {_listed(names)}" for kind, names in kinds if names)


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into ``model``; names and shapes must have been checked by :func:`matches`."""
    with torch.no_grad():
        model.load_state_dict(
            {**{n: b for n, b in model.state_dict().items() if _is_computed(n)}, **state}
        )


def _is_computed(name: str) -> bool:
    return name.rpartition(".")[2] in _COMPUTED_BUFFERS


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items() if not _is_computed(name)}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
