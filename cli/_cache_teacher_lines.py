"""Lines printed after teacher targets were written."""

from typing import TYPE_CHECKING

from scalekd.cli._options import sizes

if TYPE_CHECKING:
    from scalekd.pipelines.cache_teacher import CacheTeacherResult


def result_lines(result: "CacheTeacherResult") -> list[str]:
    """Return the lines that ``cache-teacher`` and ``cache extend`` print."""
    state = "complete" if result.complete else "not complete: other shards are still to be done"
    if result.shards_elsewhere:
        others = len(result.shards_elsewhere) - 1
        state = (
            f"not complete: another job is writing {result.shards_elsewhere[0]}"
            + (f", and {others} more" if others else "")
            + "; the process that commits the last shard completes the cache"
        )
    lines = [
        f"{result.output}: {state}; {result.num_samples:,} samples, {result.num_passes} passes,"
        f" {result.num_shards} shards ({result.shards_written} written now)",
        f"{result.views_written:,} views in {result.seconds:,.0f} s,"
        f" {result.views_per_second:,.1f} views/s, data wait {result.data_wait_share:.0%}",
    ]
    if result.total_bytes is not None:
        lines.append(sizes(result.total_bytes, result.fixed_bytes or 0, result.bytes_per_view or 0))
    if result.teacher_top1 is not None:
        lines.append(
            f"the teacher's top-1 on {result.num_labelled_views:,} labelled views is"
            f" {result.teacher_top1:.2f} %"
        )
    if result.skipped:
        lines.append(f"{result.skipped} corrupt images skipped; `scalekd cache info` lists them")
    return lines
