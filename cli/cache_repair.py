"""``scalekd cache repair``."""

from typing import TYPE_CHECKING

from scalekd.cli._paths import check_cache_folder
from scalekd.cli._record import record_command
from scalekd.pipelines._source_options import RepairConfig

if TYPE_CHECKING:
    from scalekd.pipelines.repair_cache import RepairResult


@record_command("repair", RepairConfig, arguments=("cache",))
def command(config: RepairConfig) -> "RepairResult":
    """Make damaged and missing files again, to the bytes that were committed."""
    check_cache_folder(config.cache)

    from scalekd.pipelines.repair_cache import repair_cache

    return repair_cache(config)
