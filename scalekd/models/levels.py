"""The two feature maps of a timm model that distillation reads, and their layout.

Hierarchical models (ResNet, MobileNet, ConvNeXt, Swin) have two last resolutions. Flat ones (ViT,
Mixer) have one resolution, so the level before the last is the output of an earlier block: the
reference takes block 9 of 12 of a ViT, and of a Mixer the last block but two (9 of 12, 5 of 8,
counted from 0). The final level is the input of the classifier's pooling, after the final norm, if
that has the resolution and width of the last block; of a Mixer it is, as in the reference, the
output of the last block before the norm.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape
from scalekd.text import first_line


@dataclass(frozen=True)
class Levels:
    """The two levels of a model and how to read them.

    Attributes:
        indices: Indices of the levels for ``forward_intermediates``.
        shapes: Shapes of both maps.
        final_layout: Layout of the features before the classifier: ``NCHW``, ``NHWC``, ``tokens``
            (prefix tokens first); ``block`` if the final map is the output of the last block.
    """

    indices: tuple[int, int]
    shapes: tuple[FeatureShape, FeatureShape]
    final_layout: str

    def final_map(self, final: Tensor, intermediate: Tensor) -> Tensor:
        """Return the final level as ``(batch, channel, row, column)``."""
        if self.final_layout == "NCHW":
            return final
        if self.final_layout == "NHWC":
            return final.permute(0, 3, 1, 2)
        if self.final_layout == "tokens":
            shape = self.shapes[1]
            patches = final[:, final.shape[1] - shape.num_patch_tokens :]
            return patches.transpose(1, 2).reshape(len(final), shape.num_channels, *shape.grid)
        return intermediate


def find_levels(
    model: Any, label: str, img_size: tuple[int, int], *, role: str = "student"
) -> Levels:
    """Find the levels by running the model once on a blank image, and check its logits.

    Args:
        model: A timm model on the CPU, in eval mode.
        label: Name of the model, for messages.
        role: ``student`` or ``teacher``, for messages.
        img_size: Height and width in pixels.

    Raises:
        UsageError: The model has no such levels, or does not accept the image size.
    """
    if not hasattr(model, "forward_intermediates"):
        raise UsageError(f"{label} cannot be a {role}: timm gives no access to its inner features")
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise UsageError(
            f"{label} cannot be a {role} with patch_drop_rate: the tokens it drops leave holes in "
            "the maps that are distilled"
        )
    indices = _indices(model, label, role)
    blank = torch.linspace(-1, 1, 3 * img_size[0] * img_size[1]).reshape(1, 3, *img_size)
    try:
        with torch.no_grad():
            final, (third, fourth) = model.forward_intermediates(blank, indices=list(indices))
            logits, expected = model.forward_head(final), model(blank)
    except Exception as error:
        raise UsageError(
            f"{label} cannot be a {role} at {img_size[0]} x {img_size[1]} px: {first_line(error)}"
        ) from error
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
        raise UsageError(
            f"{label} cannot be a {role}: its classifier does not run on the features that timm's "
            "forward_intermediates returns"
        )
    shapes = (_shape_of(third, label, role), _shape_of(fourth, label, role))
    return Levels(indices, shapes, _layout(model, final, fourth))


def _indices(model: Any, label: str, role: str) -> tuple[int, int]:
    info = model.feature_info
    reductions = [
        level["reduction"] for level in (info if isinstance(info, list) else info.get_dicts())
    ]
    num_levels = len(reductions)
    if num_levels < 2:
        raise UsageError(f"{label} cannot be a {role}: it has {num_levels} feature level, not two")
    last = num_levels - 1
    if reductions[-1] != reductions[-2]:
        return last - 1, last
    if isinstance(model, MlpMixer):
        return max(0, last - 2), last
    return min(math.ceil(num_levels * 3 / 4), last) - 1, last


def _shape_of(level: Tensor, label: str, role: str) -> FeatureShape:
    if level.ndim != 4:
        raise UsageError(f"{label} cannot be a {role}: a feature level is {tuple(level.shape)}")
    return FeatureShape((level.shape[2], level.shape[3]), level.shape[1])


def _layout(model: Any, final: Tensor, fourth: Tensor) -> str:
    _, channels, rows, columns = fourth.shape
    if isinstance(model, MlpMixer) or not isinstance(final, Tensor):
        return "block"
    if final.ndim == 4:
        fmt = str(getattr(model, "output_fmt", "NCHW"))
        wanted = (rows, columns, channels) if fmt == "NHWC" else (channels, rows, columns)
        return fmt if tuple(final.shape[1:]) == wanted else "block"
    if final.ndim == 3 and final.shape[2] == channels:
        num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        return "tokens" if final.shape[1] == rows * columns + num_prefix_tokens else "block"
    return "block"
