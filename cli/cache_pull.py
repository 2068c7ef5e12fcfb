"""``scalekd cache pull``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._cache_options import ShareConfig

if TYPE_CHECKING:
    from scalekd.pipelines.share_cache import ShareResult


@record_command("pull", ShareConfig, arguments=("source", "target"))
def command(config: ShareConfig) -> "ShareResult":
    """Fetch a cache, or a part of it; a later pull can extend the part.

    Every file is checked after it is written. The command may be interrupted, repeated, and run
    twice at the same time. While a cache is still being written, its committed shards are fetched.
    """
    from scalekd.pipelines.share_cache import share_cache

    return share_cache(config)
