"""The description of a student in a run's files."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from scalekd.shapes import FeatureShape


class StudentSpec(BaseModel):
    """Description of a student, as recorded in a run's files.

    Attributes:
        model: ``architecture.tag``, ``hf-hub:…`` or the name of a local folder.
        architecture: timm's entry point.
        img_size: Height and width in pixels that it was created for.
        mean: Mean of RGB in 0..1 that its input is normalised with.
        std: Standard deviation of RGB in 0..1.
        interpolation: Resize filter for its evaluation: timm's name, or ``bilinear-opencv``.
        crop_pct: Share of the shorter side that its evaluation crop keeps.
        levels: Shapes of the two feature maps that distillation reads, the final one last.
        num_classes: Number of classes; 0 for a student without a classifier.
        model_kwargs: All constructor arguments over timm's defaults for the architecture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    architecture: str
    img_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    levels: tuple[FeatureShape, FeatureShape]
    num_classes: int
    model_kwargs: dict[str, Any]
