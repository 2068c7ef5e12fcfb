"""The order in which the samples of an image set are cached.

A block of a cache, 256 views, is read as it was written, so samples that are sorted by class give
batches of one class. Samples that are shuffled already keep their order, so that a remote shard
is read from its start to its end; others are ordered by a hash of their keys.
"""

import math
from typing import Any

import numpy as np
import xxhash

Rows = np.ndarray[Any, Any]

BLOCK_SIZE = 256
"""Default number of samples per block of a cache."""

_FAR_FEWER = 0.5  # of the classes that a shuffled block has beyond its first
_MIN_DEVIATIONS = 5.0  # below the expected number: by chance in less than one set of a million


def mixed(keys: Rows) -> Rows:
    """Return the positions of the samples in an order that depends on their keys alone."""
    digests = [xxhash.xxh3_128_digest(bytes(key)) for key in keys]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), dtype=np.int64)


def is_sorted_by_class(labels: Rows, block_size: int = BLOCK_SIZE) -> bool:
    """Return whether blocks of neighbours have far fewer classes than after a shuffle.

    In a shuffled set of N samples, a class of n is missing from a block of B with the probability
    C(N - n, B) / C(N, B). The numbers of classes in blocks add up to the expected sum within a
    standard deviation of at most the root of the sum of p(1 - p): the events are negatively
    associated. Far fewer means both less than half of the classes beyond the first and less than
    chance explains, so that neither a few rare classes nor a small set raises a false alarm.
    """
    codes = np.unique(labels, return_inverse=True)[1].reshape(-1)
    counts = np.bincount(codes)
    starts = range(0, len(codes), block_size)
    observed = sum(len(np.unique(codes[start : start + block_size])) for start in starts)
    full, rest = divmod(len(codes), block_size)
    expected = variance = 0.0
    for num_blocks, size in ((full, block_size), (1, rest)):
        if num_blocks and size:
            present = 1.0 - _missing(counts, size)
            expected += num_blocks * float(present.sum())
            variance += num_blocks * float((present * (1.0 - present)).sum())
    num_blocks = len(starts)
    few = observed - num_blocks < _FAR_FEWER * (expected - num_blocks)
    return few and expected - observed > _MIN_DEVIATIONS * math.sqrt(variance)


def _missing(counts: Rows, size: int) -> Rows:
    """Return the probability of each class that none of ``size`` random samples is of it."""
    total = int(counts.sum())

    def probability(count: int) -> float:
        if count > total - size:
            return 0.0
        others = total - count
        log_probability = (
            math.lgamma(others + 1)
            - math.lgamma(others - size + 1)
            - math.lgamma(total + 1)
            + math.lgamma(total - size + 1)
        )
        return math.exp(min(0.0, log_probability))

    values, index = np.unique(counts, return_inverse=True)
    return np.array([probability(int(value)) for value in values])[index.reshape(-1)]
