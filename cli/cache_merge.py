"""``scalekd cache merge``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._cache_options import MergeConfig

if TYPE_CHECKING:
    from scalekd.pipelines.merge_caches import MergeResult


@record_command("merge", MergeConfig, arguments=("parts",))
def command(config: MergeConfig) -> "MergeResult":
    """Join parts of one cache that were written on different machines.

    Every file is checked before it is linked or copied. The same command continues after an
    interruption.
    """
    from scalekd.pipelines.merge_caches import merge_caches

    return merge_caches(config.parts, config.output, copy=config.copy_files)
