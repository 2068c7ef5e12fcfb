"""Encoding by torch operations, which run on a GPU, beside the NumPy encoder, on this CPU.

The same features of Swin-L's final stage: the integers of both must be the same, and a CPU should
lose little by using the path of a GPU. The second part is the time that is left for the host where
a GPU encodes: the integers of both stages are computed beforehand, and the shipped pipeline
compresses and writes them. Nothing is drawn.
"""

import shutil
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed import _inputs, scheduling
from benchmarks.speed._measure import Settings, median_ratio, per, take_turns
from scalekd.cache.cache import Cache
from scalekd.cache.codecs import CacheCodecs
from scalekd.cache.layout import ShardId
from scalekd.cache.writing.writer import CacheWriter
from scalekd.codecs import FeatureCodec, create_logit_codec, fit_codec
from scalekd.pipelines import _write_shards
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._teacher_stream import HostBatch
from scalekd.shapes import FeatureShape

_BATCH = 32
_MIDDLE = FeatureShape((14, 14), 768)  # Swin-L's stage 3
_HOST_BATCH = 128
_SHARD_SIZE = 512
_GOAL_MS = 2.0


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
        "host": {
            "goal_ms": _GOAL_MS,
            "stage 3": host_cost(
                settings,
                "middle",
                _middle_codec(),
                _inputs.full_rank_features(_MIDDLE, _HOST_BATCH, seed=9),
            ),
            "stage 4": host_cost(
                settings, "final", codec, _inputs.made_up_features(shape, _HOST_BATCH, seed=9)
            ),
        },
    }


def _middle_codec() -> FeatureCodec:
    blocks = [_inputs.full_rank_features(_MIDDLE, 64, seed=seed) for seed in range(4)]
    return fit_codec("transform:error=0.01", _MIDDLE, blocks)


def host_cost(
    settings: Settings, name: str, codec: FeatureCodec, features: np.ndarray[Any, Any]
) -> dict[str, float]:
    """Cost of compressing and writing a stage's integers, with logits of 1,000 classes."""
    planes = codec.encode(features)
    logits = create_logit_codec("full", 1000)
    batch = HostBatch({}, torch.randn(_HOST_BATCH, 1000).half(), {4: lambda: planes})

    class Stream:
        num_behind = 0

        def __init__(self, *arguments: Any) -> None:
            del arguments

        def start(self, pixels: Tensor) -> Any:
            del pixels
            return lambda: batch

    num_views = _SHARD_SIZE * (1 if settings.quick else 4)
    turns = 3 if settings.quick else 7
    shards = [(0, shard) for shard in range(num_views // _SHARD_SIZE)]
    job: Any = SimpleNamespace(
        teacher=SimpleNamespace(device=torch.device("cpu")),
        drawn=scheduling.FixedViews(),
        precision="fp32",
        workers=0,
    )
    root = settings.work / f"host-{name}"
    shutil.rmtree(root, ignore_errors=True)

    def begun(turn: int) -> Cache:
        return scheduling.begin_cache(
            root / f"{turn}",
            num_samples=num_views,
            codec=codec,
            logits=logits,
            batch_size=_HOST_BATCH,
            shard_size=_SHARD_SIZE,
        )

    ready = [begun(turn) for turn in range(turns + 1)]
    cache = ready[-1]

    def write() -> None:
        with (
            CacheWriter(ready.pop()) as writer,
            ProgressReport("", num_views, enabled=False) as progress,
        ):
            _write_shards.write_claimed(
                job, writer, CacheCodecs({4: codec}, logits), shards, progress
            )

    with mock.patch.object(_write_shards, "TeacherStream", Stream):
        costs = take_turns({"write": write}, turns)["write"]
    num_bytes = sum(
        file.num_bytes
        for unit, shard in shards
        for file in cache.record(ShardId(unit, shard)).files.values()
    )
    shutil.rmtree(root)
    return {**per(costs, num_views), "bytes": num_bytes / num_views}
