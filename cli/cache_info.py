"""``scalekd cache info``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._cache_options import InfoConfig

if TYPE_CHECKING:
    from scalekd.pipelines.inspect_cache import CacheInfo


@record_command("info", InfoConfig, arguments=("cache",))
def command(config: InfoConfig) -> "CacheInfo":
    """Describe a cache: teacher, views, stages, codecs and their errors, size."""
    from scalekd.pipelines.inspect_cache import cache_info

    return cache_info(config.cache)
