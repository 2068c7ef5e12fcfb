"""``scalekd cache extend``."""

from typing import TYPE_CHECKING

from scalekd.cli._paths import check_cache_folder, check_data_dir
from scalekd.cli._record import record_command
from scalekd.pipelines._source_options import ExtendConfig

if TYPE_CHECKING:
    from scalekd.pipelines.cache_teacher import CacheTeacherResult


@record_command("extend", ExtendConfig, arguments=("cache",))
def command(config: ExtendConfig) -> "CacheTeacherResult":
    """Add passes to a cache; or, with --name, stages or another teacher's targets.

    Options that are left out are taken from the cache, and existing files are not changed. The same
    command continues after an interruption.
    """
    check_cache_folder(config.cache)
    check_data_dir(config.data_dir)

    from scalekd.pipelines.extend_cache import extend_cache

    return extend_cache(config)
