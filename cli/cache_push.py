"""``scalekd cache push``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._cache_options import ShareConfig

if TYPE_CHECKING:
    from scalekd.pipelines.share_cache import ShareResult


@record_command("push", ShareConfig, arguments=("source", "target"))
def command(config: ShareConfig) -> "ShareResult":
    """Send a cache, or a part of it, to a folder, a bucket or a Hugging Face dataset.

    Only missing files are sent: first the files of a shard, then its record, and last the manifest.
    The command may be interrupted, repeated, and run twice at the same time.
    """
    from scalekd.pipelines.share_cache import share_cache

    return share_cache(config)
