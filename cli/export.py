"""``scalekd export``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._run_options import ExportConfig

if TYPE_CHECKING:
    from scalekd.export.timm import Exported


@record_command("export", ExportConfig, arguments=("run",))
def command(config: ExportConfig) -> "Exported":
    """Write the best student of the training run RUN, or of a checkpoint folder inside it.

    The written model is opened again and its outputs are compared with the student's: they must be
    identical, or for ONNX within 1e-4 of the largest value.
    """
    from scalekd.pipelines.export import export

    return export(
        config.run,
        config.output,
        export_format=config.format,
        use_ema=config.use_ema,
        img_size=config.img_size,
        features=config.features,
    )
