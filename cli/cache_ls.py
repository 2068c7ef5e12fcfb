"""``scalekd cache ls``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._cache_options import ListConfig

if TYPE_CHECKING:
    from scalekd.pipelines.list_caches import CacheList


@record_command("ls", ListConfig, arguments=("root",))
def command(config: ListConfig) -> "CacheList":
    """List the caches below a folder or in a bucket, with their contents and state.

    Reads manifests and plans only; `scalekd cache verify` checks the data.
    """
    from scalekd.pipelines.list_caches import CacheList, list_caches

    caches = list_caches(config.root, max_depth=config.depth)
    return CacheList(root=config.root, caches=tuple(caches))
