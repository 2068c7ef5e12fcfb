"""View parameters as arrays, one row a view: what a cache stores.

Only what the policy can vary is stored; what it fixes comes back from the policy. Numbers are as
narrow as they can be and still exact, and absent things are zeros, which compress to nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalekd.errors import CacheCorrupt
from scalekd.views._components import CenterCrop, RandomCrop
from scalekd.views._operations import OPERATIONS
from scalekd.views._params import CropBox, EraseBox, Operation, ViewParams
from scalekd.views._policy import ViewPolicy

_NAMES = {operation.id: name for name, operation in OPERATIONS.items()}
_IDS = {name: operation.id for name, operation in OPERATIONS.items()}

Columns = dict[str, NDArray[Any]]


def view_columns(policy: ViewPolicy) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """The arrays that hold views of ``policy``: dtype (little-endian), and shape of one row.

    Returns:
        ``crop``: top, left, height, width in source pixels; ``flip``: 0 or 1; ``operations``:
        ids, 0 for none, applied ones first; ``arguments``: of those operations; ``erase``: top,
        left, height, width in 65,536ths of the view, all 0 for none; ``noise_seed``. A policy
        that never flips has no ``flip``, and so on; one that fixes everything has no arrays.
    """
    columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    if isinstance(policy.geometry, RandomCrop):
        columns["crop"] = (np.dtype("<u2"), (4,))
    if 0 < policy.flip < 1:
        columns["flip"] = (np.dtype("u1"), ())
    if policy.rand is not None:
        columns["operations"] = (np.dtype("u1"), (policy.rand.num_operations,))
        columns["arguments"] = (np.dtype("<f2"), (policy.rand.num_operations,))
    if policy.erase:
        columns["erase"] = (np.dtype("<u2"), (4,))
        columns["noise_seed"] = (np.dtype("<u4"), ())
    return columns


def pack_views(views: Sequence[ViewParams], policy: ViewPolicy) -> Columns:
    """Lay views out as arrays, first axis view.

    Args:
        views: Drawn from ``policy``.
        policy: Decides which arrays there are.

    Returns:
        The arrays of ``view_columns``.

    Raises:
        ValueError: A view cannot have been drawn from ``policy``, so that packing would lose it.
    """
    columns: Columns = {
        name: np.zeros((len(views), *shape), dtype)
        for name, (dtype, shape) in view_columns(policy).items()
    }
    num_slots = policy.rand.num_operations if policy.rand else 0
    for row, view in enumerate(views):
        fits = len(view.operations) <= num_slots
        if fits:
            values = _row(view, num_slots)
            for name, column in columns.items():
                column[row] = values[name]
        # Reading each row back costs ten microseconds and leaves no way to lose a view unseen.
        if not fits or unpack_view(columns, row, policy) != view:
            raise ValueError(f"{view} is not a view of {policy}")
    return columns


def _row(view: ViewParams, num_slots: int) -> dict[str, Any]:
    unused = [0] * (num_slots - len(view.operations))
    return {
        "crop": view.crop or (0, 0, 0, 0),
        "flip": view.flip,
        "operations": [_IDS[operation.name] for operation in view.operations] + unused,
        "arguments": [operation.argument for operation in view.operations] + unused,
        "erase": view.erase or (0, 0, 0, 0),
        "noise_seed": view.noise_seed,
    }


def unpack_view(columns: Mapping[str, NDArray[Any]], row: int, policy: ViewPolicy) -> ViewParams:
    """Read one view back, exactly as it was drawn.

    Args:
        columns: The arrays of ``view_columns(policy)``.
        row: Which view.
        policy: The policy that the views were drawn from.

    Raises:
        CacheCorrupt: The row holds numbers that no draw gives.
    """
    record = {name: columns[name][row].tolist() for name in view_columns(policy)}
    try:
        center = policy.geometry.fraction if isinstance(policy.geometry, CenterCrop) else None
        flip = record.get("flip", int(policy.flip == 1))
        erase = record.get("erase", [0, 0, 0, 0])
        if flip not in (0, 1):
            raise ValueError(f"flip is {flip}")
        if not any(erase) and record.get("noise_seed", 0):
            raise ValueError("noise without an erased box")
        return ViewParams(
            crop=CropBox(*record["crop"]) if "crop" in record else None,
            center=center,
            flip=bool(flip),
            operations=_operations(record.get("operations", []), record.get("arguments", [])),
            erase=EraseBox(*erase) if any(erase) else None,
            noise_seed=record.get("noise_seed", 0),
            interpolation=policy.interpolation,
            mean=policy.mean,
            std=policy.std,
        )
    except ValueError as error:
        raise CacheCorrupt(f"the parameters of view {row} are damaged: {error}") from None


def _operations(ids: list[int], arguments: list[float]) -> tuple[Operation, ...]:
    count = sum(1 for id_ in ids if id_)
    if any(ids[count:]) or any(arguments[count:]):
        raise ValueError(f"operations {ids} with arguments {arguments} leave gaps")
    unknown = [id_ for id_ in ids[:count] if id_ not in _NAMES]
    if unknown:
        raise ValueError(f"no operation has the number {unknown[0]}")
    return tuple(
        Operation(_NAMES[id_], argument)
        for id_, argument in zip(ids[:count], arguments, strict=False)
    )
