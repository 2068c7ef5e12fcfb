"""Sizes of ScaleKD's projectors: as published, or light.

As published, a ResNet-50 step with the teacher Swin-L has the FLOPs of 5.4 steps without a teacher.
Most of that are two passes of the tail, one for each view, and the dense 3 x 3 convolutions of the
projectors; neither is needed to define the losses. See ``docs/benchmarks.md``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """Size of the projectors and of the tail's batch; losses and targets are the same in all forms.

    Attributes:
        shared_views: Whether one projector per stage serves both views, so that one set of tokens
            passes the tail and both losses use its output.
        depthwise_stem: Whether the projectors' stem convolution is depthwise; see
            `CrossAttentionProjector`.
        ffn_ratio: Width of the projectors' MLP relative to the teacher's width.
    """

    shared_views: bool
    depthwise_stem: bool
    ffn_ratio: int


PUBLISHED = Form(shared_views=False, depthwise_stem=False, ffn_ratio=4)
"""The form of the projectors in the authors' published code."""

LIGHT = Form(shared_views=True, depthwise_stem=True, ffn_ratio=1)
"""A form whose steps have at most twice the FLOPs of steps without a teacher, for ResNet-50 and
ViT-S/16 with Swin-L at 224 px."""
