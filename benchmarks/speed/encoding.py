"""Encoding by torch operations, which run on a GPU, beside the NumPy encoder, on this CPU.

The same features of Swin-L's final stage: the integers of both must be the same, and a CPU should
lose little by using the path of a GPU.
"""

from typing import Any

import numpy as np
import torch

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings, median_ratio, per, take_turns

_BATCH = 32


def run(settings: Settings) -> dict[str, Any]:
    codec = _inputs.swin_codec(settings)
    encoder = codec.encoder(_BATCH)
    if encoder is None:
        raise RuntimeError(f"codec {codec.name} has no encoder of torch operations")
    shape = codec.shape
    random = np.random.default_rng(0)
    features = random.standard_normal(
        (_BATCH, shape.num_tokens, shape.num_channels), dtype=np.float32
    )
    values = torch.from_numpy(features)

    def by_torch() -> dict[str, np.ndarray[Any, Any]]:
        with torch.inference_mode():
            return {name: plane.numpy() for name, plane in encoder(values).planes.items()}

    ours, theirs = by_torch(), codec.encode(features)
    costs = take_turns(
        {"numpy": lambda: codec.encode(features), "torch": by_torch}, 3 if settings.quick else 9
    )
    return {
        "views": _BATCH,
        "shape": [*shape.grid, shape.num_channels],
        "different": {name: float((ours[name] != theirs[name]).mean()) for name in theirs},
        "per_view": {name: per(found, _BATCH) for name, found in costs.items()},
        "torch_over_numpy": median_ratio(costs["torch"], costs["numpy"], "cpu"),
    }
