"""Teachers without a tail: all other timm models, and modules of the user.

Their features can be distilled, and their logits if they have a classifier. They have no last stage
that runs by itself, which teacher parameter perception needs, so students learn from them with
``tpp=false``.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from scalekd.errors import UsageError
from scalekd.models.levels import Levels
from scalekd.shapes import FeatureShape
from scalekd.teachers.families import Family, TimmModel, Tokens

FEATURES_ONLY = "features"
"""Name of the family in the documents of a cache."""

Map = Float[Tensor, "batch channel row column"]


class FeaturesOnly(Family):
    """Any timm model with ``forward_intermediates``: its last two levels, as for a student.

    Stage 4 is the input of the classifier's pooling if that has the resolution of the last level;
    prefix tokens are dropped.

    Args:
        levels: The last two levels of the model, found at its image size.
    """

    name: ClassVar[str] = FEATURES_ONLY
    about: ClassVar[str] = (
        "ConvNeXt, ResNet, Hiera, SAM, MaxViT, …: every other with inner features"
    )

    def __init__(self, levels: Levels) -> None:
        self._levels = levels

    def stages(self, model: TimmModel, tail_blocks: int) -> dict[int, FeatureShape]:
        return dict(zip((3, 4), self._levels.shapes, strict=True))

    def outputs(
        self, model: TimmModel, images: Tensor, tail_blocks: int, *, logits: bool
    ) -> tuple[Tokens, Tokens, Tensor | None]:
        final, (third, fourth) = model.forward_intermediates(
            images, indices=list(self._levels.indices)
        )
        last = self._levels.final_map(final, fourth)
        return _tokens(third), _tokens(last), model.forward_head(final) if logits else None


class OwnModule(Family):
    """A module that returns features, or features and logits, of normalised images.

    Args:
        stages: Shapes of the features that it returns.
    """

    name: ClassVar[str] = FEATURES_ONLY

    def __init__(self, stages: dict[int, FeatureShape]) -> None:
        self._stages = stages

    def stages(self, model: nn.Module, tail_blocks: int) -> dict[int, FeatureShape]:
        return self._stages

    def outputs(
        self, model: nn.Module, images: Tensor, tail_blocks: int, *, logits: bool
    ) -> tuple[Tokens, Tokens, Tensor | None]:
        features, scores = returned(model, images)
        stage3, stage4 = (_tokens(features[index]) for index in (0, -1))
        return stage3, stage4, scores if logits else None


def returned(model: Callable[[Tensor], Any], images: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Run a user's module and split its output into feature maps and logits.

    Raises:
        UsageError: The output is neither.
    """
    output = model(images)
    features, logits = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    maps = list(features) if isinstance(features, list) else [features]
    if not 1 <= len(maps) <= 2 or not all(_is_array(m, 4, len(images)) for m in maps):
        raise UsageError(
            "a teacher's module must return its final feature map (batch, channel, row, column), or"
            " a list of the one before it and the final one; or a pair of that and logits (batch,"
            f" class) or None; for {len(images)} images it returned {_described(output)}"
        )
    if logits is not None and not _is_array(logits, 2, len(images)):
        raise UsageError(
            f"logits must be (batch, class), not {_described(logits)} for {len(images)} images"
        )
    return maps, logits


def _is_array(value: Any, num_dimensions: int, num_images: int) -> bool:
    """Return whether a value is a tensor of real numbers with a row for every image."""
    return (
        isinstance(value, Tensor)
        and value.ndim == num_dimensions
        and len(value) == num_images
        and value.numel() > 0
        and value.is_floating_point()
    )


def _tokens(level: Map) -> Tokens:
    return level.flatten(2).transpose(1, 2)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f" of {value.dtype}"
        return f"a tensor {tuple(value.shape)}{kind}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{type(value).__name__} of {', '.join(_described(item) for item in value[:4])}"
    return type(value).__name__
