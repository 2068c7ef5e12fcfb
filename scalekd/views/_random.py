"""Random numbers for views, which are the same on every machine and in any order.

Each (seed, sample key, pass) has its own stream, and each component after the first four has
another one: a 128-bit BLAKE2b hash of the three, salted with the component's name, is the key of a
Philox counter generator. Nothing else is used, so that a view does not depend on order, worker,
rank or world size.

NumPy promises that a bit generator's raw 64-bit output never changes (NEP 19), but makes no such
promise for what ``Generator`` derives from it, and the C library's ``exp`` and ``log`` differ in
the last bit between platforms. Everything here is therefore derived from raw output by integer
arithmetic and by IEEE additions, multiplications, divisions and square roots, whose results are
exact by standard.
"""

import struct
from functools import lru_cache
from hashlib import blake2b
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from scalekd.errors import UsageError

_PERSON = b"scalekd view 1"  # BLAKE2b personalisation: name and version of this use
_NOISE_KEY = int.from_bytes(b"erasenoi", "little")  # separates noise from the streams of views
_QUANTILES = 2**16  # a normal number is one of this many equally likely quantiles, up to ±4.3


def view_words(
    seed: int, key: str, pass_index: int, count: int, *, component: str = ""
) -> list[int]:
    """Return the first ``count`` raw 64-bit words of a view's stream.

    Args:
        seed: The cache's seed, in 0..2**64 - 1.
        key: Key of the sample.
        pass_index: Index of the pass over the samples, from 0.
        count: Number of words.
        component: Name of the component whose own stream is read, at most 16 bytes; empty for the
            stream that crop, flip, erase and rand share.

    Raises:
        UsageError: ``seed`` or ``pass_index`` is out of range.
    """
    if not (0 <= seed < 2**64 and 0 <= pass_index < 2**64):
        raise UsageError(f"seed and pass must be in 0..2**64 - 1, not {seed} and {pass_index}")
    # Two numbers of fixed length come first, so that different triples give different bytes. Keys
    # made from file names may contain surrogate escapes, which plain UTF-8 refuses.
    text = struct.pack("<QQ", seed, pass_index) + key.encode("utf-8", "surrogatepass")
    digest = blake2b(text, digest_size=16, person=_PERSON, salt=component.encode()).digest()
    return _philox(*struct.unpack("<QQ", digest)).random_raw(count).tolist()  # type: ignore[no-any-return]


def noise_words(noise_seed: int, count: int) -> NDArray[np.uint16]:
    """Return ``count`` uniform 16-bit numbers of the noise with this seed."""
    words = _philox(noise_seed, _NOISE_KEY).random_raw(-(-count // 4))
    return words.astype("<u8", copy=False).view("<u2")[:count]


def _philox(low: int, high: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([low, high], dtype=np.uint64))


def half_precision(value: float) -> float:
    """Round to float16, so that a draw uses exactly the number that is stored."""
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def uniform(word: int, low: float = 0.0, high: float = 1.0) -> float:
    """Convert a word to a number in ``[low, high)`` with 53 random bits."""
    return low + (high - low) * ((word >> 11) * 2.0**-53)


def below(word: int, count: int) -> int:
    """Convert a word to an integer in ``0..count - 1``; the bias is below ``count / 2**64``."""
    return word * count >> 64


def normal(word: int) -> float:
    """Convert a word to a normal number: the midpoint of a quantile, rounded to 2**-20."""
    level = ((word >> 48) * 2 + 1) / (2 * _QUANTILES)
    return round(NormalDist().inv_cdf(level) * 2**20) / 2**20


def exponential(x: float) -> float:
    """Compute ``exp(x)`` for ``|x| < 2`` by its power series, equal on all machines."""
    total = term = 1.0
    for i in range(1, 25):  # the next term is below 2**-54
        term *= x / i
        total += term
    return total


@lru_cache(maxsize=16)
def noise_table(mean: float, std: float) -> NDArray[np.uint8]:
    """Return the pixel value of erasing noise for each uniform 16-bit number.

    timm erases with N(0, 1) after normalisation. As an 8-bit pixel before normalisation that is
    ``clip(round(255 * (mean + std * n)))``. Values up to v therefore take the share
    Φ(((v + 0.5) / 255 - mean) / std) of the 65,536 numbers; only the share's rounding to an
    integer is left to compute, and that is the same on every machine.

    Args:
        mean: Mean of the channel, in 0..1.
        std: Standard deviation of the channel, in 0..1.
    """
    normal_dist = NormalDist(mean, std)
    ends = [round(_QUANTILES * normal_dist.cdf((value + 0.5) / 255)) for value in range(255)]
    counts = np.diff([0, *ends, _QUANTILES])
    table = np.repeat(np.arange(256, dtype=np.uint8), counts)
    table.flags.writeable = False
    return table
