"""``scalekd cache export``."""

from typing import TYPE_CHECKING

from scalekd.cli._paths import check_paths
from scalekd.cli._record import record_command
from scalekd.pipelines._cache_options import ExportTargetsConfig

if TYPE_CHECKING:
    from scalekd.pipelines.export_targets import ExportedTargets


@record_command("export", ExportTargetsConfig, arguments=("cache",))
def command(config: ExportTargetsConfig) -> "ExportedTargets":
    """Write decoded logits or features of a cache for other programs.

    Every row has the key, the pass and the label of its view. The file's metadata describes the
    cache.
    """
    check_paths(cache=config.cache, data_dir=None)

    from scalekd.pipelines.export_targets import export_targets

    return export_targets(config)
