"""Write a trained student for use elsewhere.

scalekd export ./run --output ./resnet50-scalekd --format timm
"""

from pathlib import Path
from typing import Literal

from scalekd.export.timm import Exported, ExportFormat, export_student
from scalekd.training import load_trained_student


def export(
    run: Path,
    output: Path,
    *,
    export_format: ExportFormat = "timm",
    use_ema: bool = False,
    img_size: tuple[int, int] | Literal["any"] | None = None,
    features: bool = False,
) -> Exported:
    """Export a run's best student, or that of one of its checkpoints.

    Raises:
        UsageError: The run does not exist, ``output`` exists, or the options exclude
            each other.
        EnvironmentFault: The export cannot be written, or its outputs differ from the student's.
    """
    student = load_trained_student(run, use_ema=use_ema)
    return export_student(
        student, output, export_format=export_format, img_size=img_size, features=features
    )
