"""``scalekd doctor``."""

from typing import TYPE_CHECKING

from scalekd.cli._paths import check_paths
from scalekd.cli._record import record_command
from scalekd.pipelines._source_options import DoctorConfig

if TYPE_CHECKING:
    from scalekd.pipelines.doctor import Diagnosis


@record_command("doctor", DoctorConfig)
def command(config: DoctorConfig) -> "Diagnosis":
    """Check this machine, an image set, and that a cache's views are redrawn exactly.

    The exit code is 3 if images cannot be decoded, and 4 if views of the cache differ.
    """
    check_paths(
        cache=config.cache,
        data_dir=config.data_dir,
        split=config.split,
        labels=config.labels,
    )

    from scalekd.pipelines.doctor import diagnose

    return diagnose(
        config.cache,
        data_dir=config.data_dir,
        split=config.split,
        image_options=config.image_options,
        num_views=config.views,
        num_images=config.images,
    )
