"""``scalekd cache show``."""

from typing import TYPE_CHECKING

from scalekd.cli._paths import check_paths
from scalekd.cli._record import record_command
from scalekd.pipelines._source_options import ShowConfig

if TYPE_CHECKING:
    from scalekd.pipelines.show_cache import ShownCache


@record_command("show", ShowConfig, arguments=("cache",), leave_out=("workers",))
def command(config: ShowConfig) -> "ShownCache":
    """Write a page that shows a cache: its views, stored features and the teacher's answers.

    The page is one HTML file that needs no network. Pass --data-dir to see the pixels of all views,
    and --teacher to compare the stored features with the teacher's.
    """
    check_paths(
        cache=str(config.cache),
        data_dir=config.data_dir,
        split=config.split,
        labels=config.labels,
    )

    from scalekd.pipelines.show_cache import show_cache

    return show_cache(config)
