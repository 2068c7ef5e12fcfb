"""Decoded targets of a cache as NumPy arrays.

from scalekd.cache import open_cache, read_features, read_logits

cache = open_cache("./swin_l-cache")
for first, count in cache.blocks():
features = read_features(cache, stage=4, pass_index=0, first=first, count=count)
keys = [cache.samples.key(row) for row in range(first, first + count)]
"""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from scalekd.cache.reading.reader import CacheReader
from scalekd.codecs import FeatureCodec, LogitCodec
from scalekd.errors import UsageError
from scalekd.shapes import Rows

_decoders: WeakKeyDictionary[FeatureCodec | LogitCodec, Any] = WeakKeyDictionary()


def read_features(
    reader: CacheReader, *, stage: int, pass_index: int, first: int, count: int
) -> Rows:
    """Read and decode the features of consecutive samples, on the CPU.

    Args:
        reader: The cache.
        stage: 3 or 4.
        pass_index: Number of the pass.
        first: Number of the first sample.
        count: Number of samples, all of one shard, such as a block of ``reader.blocks()``.

    Returns:
        float32 ``(view, token, channel)``: prefix tokens first, then the patch tokens of the grid
        row by row; see ``reader.codecs.stages[stage].shape``.

    Raises:
        UsageError: The cache does not contain the stage, or it was not fetched.
        CacheCorrupt: A file is missing or is not the one committed.
    """
    codec = reader.codecs.stages.get(stage)
    if codec is None:
        stages = ", ".join(map(str, reader.codecs.stages)) or "none"
        raise UsageError(
            f"{reader.location}: the cache has no features of stage {stage} (stages: {stages});"
            " `scalekd cache extend --name NAME --stages` adds some"
        )
    planes = _planes(reader, f"stage{stage}", pass_index, first, count)
    return np.asarray(_decoded(codec, planes))


def read_logits(reader: CacheReader, *, pass_index: int, first: int, count: int) -> Rows:
    """Read and decode the logits of consecutive samples, on the CPU.

    Logits stored as ``topk:K`` become log-probabilities; the probability of the other classes
    together is divided evenly among them.

    Args:
        reader: The cache.
        pass_index: Number of the pass.
        first: Number of the first sample.
        count: Number of samples, all of one shard.

    Returns:
        float32 ``(view, class)``.

    Raises:
        UsageError: The cache does not contain logits, or they were not fetched.
        CacheCorrupt: A file is missing or is not the one committed.
    """
    codec = reader.codecs.logits
    if codec is None:
        raise UsageError(
            f"{reader.location}: the cache has no logits; write one by cache-teacher --logits full"
            " with a teacher that has a classifier"
        )
    decoded = _decoded(codec, _planes(reader, "logits", pass_index, first, count))
    if "logits" in decoded:
        return np.asarray(decoded["logits"])
    indices, log_probs = np.asarray(decoded["indices"]), np.asarray(decoded["log_probs"])
    others = codec.num_classes - indices.shape[1]
    with np.errstate(divide="ignore"):
        rest = np.log(np.asarray(decoded["tail_mass"], np.float32) / np.float32(max(1, others)))
    logits = np.repeat(rest[:, None], codec.num_classes, axis=1)
    np.put_along_axis(logits, indices, log_probs, axis=1)
    return logits


def _planes(
    reader: CacheReader, group: str, pass_index: int, first: int, count: int
) -> dict[str, Rows]:
    """Read the stored planes of a group, with the view axis first."""
    start = f"{group}/"
    names = [array.name for array in reader.layout.views if array.name.startswith(start)]
    rows = reader.read_rows(pass_index, first, count, names)
    return {name.removeprefix(start): values for name, values in rows.items()}


def _decoded(codec: FeatureCodec | LogitCodec, planes: dict[str, Rows]) -> Any:
    """Decode stored planes; the decoder of a codec is built once."""
    import torch

    if codec not in _decoders:
        _decoders[codec] = codec.decoder()
    with torch.inference_mode():
        return _decoders[codec](
            {name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in planes.items()}
        )
