"""Whether this machine draws the pixels of a cache that other versions of the libraries drew.

Versions of Pillow, NumPy, Python and the decoders are provenance of a cache, not part of what was
asked for. Where they differ, the witnesses and some committed views are drawn again; a cache whose
pixels are met here may be added to and repaired here.
"""

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
_NUM_SHARDS = 8  # among which they are spread, over all passes


def changed_versions(environment: dict[str, str]) -> list[str]:
    """Each library whose version here is not that of ``environment``, with both versions."""
    here = pixel_environment()
    return [
        f"{name} {environment.get(name, 'none')} (here {here.get(name, 'none')})"
        for name in sorted(here.keys() | environment.keys())
        if here.get(name) != environment.get(name)
    ]


def check_pixels(cache: Cache, drawn: DrawnViews, *, skip_damaged: bool = False) -> None:
    """Draw the witnesses and some committed views again, if other versions drew them.

    Args:
        cache: The cache.
        drawn: Draws the views of the cache.
        skip_damaged: Whether committed files that are damaged are left out instead of reported.

    Raises:
        CacheMismatch: A pixel differs, or an image is another one.
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
    """What is drawn differently; ``None`` when every pixel is met."""
    recorded = recorded_shards(cache.storage, cache.identity.num_shards)
    committed = [shard for shard in recorded if shard.unit != SAMPLES]
    spread = np.linspace(0, len(committed) - 1, min(len(committed), _NUM_SHARDS)).astype(int)
    for number, index in enumerate(spread.tolist()):
        share = number / max(1, len(spread) - 1)
        try:
            problem = _shard_problem(cache, drawn, committed[index], share)
        except CacheCorrupt:
            if not skip_damaged:
                raise
            continue
        if problem is not None:
            return problem
    try:
        return _witness_problem(cache, drawn)
    except CacheCorrupt:
        if not skip_damaged:
            raise
        return None


def _shard_problem(cache: Cache, drawn: DrawnViews, shard: ShardId, share: float) -> str | None:
    """Compare views that lie ``share`` of the way through a shard."""
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
    kept = [at for at in shard_positions if not skipped or drawn.images.key(at) not in skipped]
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
    """Draw the views, in pass 0, of the first ``at_most`` samples that can be decoded.

    Returns:
        Pixels, uint8 ``(view, height, width, 3)``.

    Raises:
        DataError: No image can be decoded, or one cannot and corrupt ones are not to be skipped.
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
