"""``scalekd models``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.options import Options

if TYPE_CHECKING:
    from scalekd.pipelines.list_models import KnownModels


@record_command("models", Options)
def command(config: Options) -> "KnownModels":
    """List the short names of teachers and students, and the targets of each model family."""
    from scalekd.pipelines.list_models import list_models

    del config
    return list_models()
