"""``scalekd cache convert``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._cache_options import ConvertConfig

if TYPE_CHECKING:
    from scalekd.pipelines.convert_cache import ConvertResult


@record_command("convert", ConvertConfig, arguments=("source", "output"))
def command(config: ConvertConfig) -> "ConvertResult":
    """Write a cache in its other form: Zarr arrays, or WebDataset tars.

    Every stored value is kept; the same command finishes an interrupted conversion.
    """
    from scalekd.pipelines.convert_cache import convert_cache

    return convert_cache(config)
