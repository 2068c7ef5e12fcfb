"""Check that this machine draws the same pixels as the libraries that wrote a cache.

Versions of Pillow, NumPy, Python and the image decoders are recorded in a cache, but are not part
of its identity. If they differ here, the witnesses and some committed views are drawn again; if all
pixels are equal, the cache can be extended and repaired on this machine.
"""

import contextlib
from typing import Any

import numpy as np

from scalekd.cache.cache import Cache
from scalekd.cache.files import read_checked
from scalekd.cache.layout import SAMPLES, ShardId
from scalekd.cache.reading.committed import CommittedShard, recorded_shards
from scalekd.cache.tables import load_witnesses
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError
from scalekd.loading.drawing import DrawnViews, DrawRequest
from scalekd.views import mean_difference, pixel_environment

_NUM_VIEWS = 64  # half a second of drawing
_NUM_SHARDS = 8  # shards of all passes among which these views are spread


def changed_versions(environment: dict[str, str]) -> list[str]:
    """Describe each library whose version differs from ``environment``, with both versions."""
    here = pixel_environment()
    return [
        f"{name} {environment.get(name, 'none')} (here {here.get(name, 'none')})"
        for name in sorted(here.keys() | environment.keys())
        if here.get(name) != environment.get(name)
    ]


def check_pixels(cache: Cache, drawn: DrawnViews, *, skip_damaged: bool = False) -> None:
    """Draw the witnesses and some committed views again, if other library versions drew them.

    Args:
        cache: The cache.
        drawn: Draws the views of the cache.
        skip_damaged: Whether to leave out damaged files instead of raising ``CacheCorrupt``.

    Raises:
        CacheMismatch: A pixel differs, or an image differs from the one that the teacher saw.
        CacheCorrupt: A committed file is damaged.
    """
    changed = changed_versions(cache.identity.views.environment)
    if not changed:
        return
    problem = _problem(cache, drawn, skip_damaged=skip_damaged)
    if problem is not None:
        raise CacheMismatch(
            f"{cache.location}: this machine {problem}. The cache was drawn with"
            f" {', '.join(changed)}: install those versions to add to it or repair it"
        )


def _problem(cache: Cache, drawn: DrawnViews, *, skip_damaged: bool) -> str | None:
    """Describe the first view that is drawn differently; ``None`` if all pixels are equal."""
    recorded = recorded_shards(cache.storage, cache.identity.num_shards)
    committed = [shard for shard in recorded if shard.unit != SAMPLES]
    tolerated = (CacheCorrupt,) if skip_damaged else ()
    spread = np.linspace(0, len(committed) - 1, min(len(committed), _NUM_SHARDS)).astype(int)
    for number, index in enumerate(spread.tolist()):
        share = number / max(1, len(spread) - 1)
        with contextlib.suppress(*tolerated):
            problem = _shard_problem(cache, drawn, committed[index], share)
            if problem is not None:
                return problem
    with contextlib.suppress(*tolerated):
        return _witness_problem(cache, drawn)
    return None


def _shard_problem(cache: Cache, drawn: DrawnViews, shard: ShardId, share: float) -> str | None:
    """Draw a few views of a shard again, from the fraction ``share`` of it on, and compare them."""
    identity, pass_index = cache.identity, int(shard.unit)
    stored = CommittedShard(cache, shard)
    num_rows = stored.record.num_rows
    count = min(num_rows, _NUM_VIEWS // _NUM_SHARDS)
    start = round(share * (num_rows - count))
    rows = range(start, start + count)
    if not rows:
        return None
    skipped = set(stored.record.skipped)
    first = shard.number * identity.shard_size
    shard_positions = range(first, first + identity.rows_of(shard.number))
    kept = [p for p in shard_positions if not skipped or drawn.images.key(p) not in skipped]
    hashes = stored.rows("pixel_hash", rows)
    sources: np.ndarray[Any, Any] | None = None
    samples = ShardId(SAMPLES, shard.number)
    if cache.has(samples):
        sources = CommittedShard(cache, samples).rows("source_hash", rows)
    for row, position in enumerate(kept[start : start + count]):
        where = f"pass {pass_index}, sample {drawn.images.key(position)}"
        try:
            here = drawn.draw(DrawRequest(pass_index, shard.number, (position,)))
        except DataError as error:
            return f"cannot draw a committed view again ({where}: {error})"
        if here.skipped:
            return f"cannot decode an image of the cache ({where})"
        if sources is not None and here.source_hashes[0] != sources[row]:
            raise CacheMismatch(
                f"{drawn.images.location}: {where}: another image than the one the teacher saw;"
                " pass the --data-dir that the cache was made from"
            )
        if here.pixel_hashes[0] != hashes[row]:
            return (
                f"draws a committed view differently ({where}: pixel hash"
                f" {int(hashes[row]):016x} in the cache, {int(here.pixel_hashes[0]):016x} here)"
            )
    return None


def _witness_problem(cache: Cache, drawn: DrawnViews) -> str | None:
    storage, views = cache.storage, cache.identity.views
    content = read_checked(storage, views.witnesses, views.witnesses_digest)
    seen = load_witnesses(cache.identity, content, storage.locate(views.witnesses))
    here = draw_witnesses(drawn, at_most=len(seen))
    if len(here) != len(seen):
        return f"draws {len(here)} of the cache's {len(seen)} witness views"
    drift = max(mean_difference(*pair) for pair in zip(here, seen, strict=True))
    if drift > 0:
        return f"draws the cache's witness views with a mean difference of up to {drift:.3g}/255"
    return None


def draw_witnesses(drawn: DrawnViews, *, at_most: int) -> np.ndarray[Any, Any]:
    """Draw the views of pass 0 of the first ``at_most`` samples that can be decoded.

    Returns:
        Pixels, uint8 ``(view, height, width, 3)``.

    Raises:
        DataError: No image can be decoded, or one is corrupt and corrupt images are not skipped.
    """
    pixels: list[np.ndarray[Any, Any]] = []
    for position in range(len(drawn.images)):
        batch = drawn.draw(DrawRequest(0, 0, (position,)))
        pixels.extend(batch.pixels.permute(0, 2, 3, 1).numpy())
        if len(pixels) == at_most:
            break
    if not pixels:
        raise DataError(f"{drawn.images.location}: every image is corrupt")
    return np.stack(pixels)
