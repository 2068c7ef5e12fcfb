"""``scalekd cache verify``."""

from typing import TYPE_CHECKING

from scalekd.cli._paths import check_cache_folder
from scalekd.cli._record import record_command
from scalekd.pipelines._source_options import VerifyConfig

if TYPE_CHECKING:
    from scalekd.pipelines.inspect_cache import Verification

_LEFT_OUT = ("workers", "local_cache", "local_cache_size")


@record_command("verify", VerifyConfig, arguments=("cache",), leave_out=_LEFT_OUT)
def command(config: VerifyConfig) -> "Verification":
    """Check the digest of every file of a cache; the exit code is 4 for a damaged cache."""
    check_cache_folder(config.cache)

    from scalekd.pipelines.inspect_cache import verify_as_asked

    return verify_as_asked(config)
