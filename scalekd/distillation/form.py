"""How large ScaleKD's projectors are: as published, or light.

By FLOPs a ResNet-50 step under Swin-L costs 5.4 plain ones as published. Two passes of the tail,
one for each view, and the dense 3 x 3 convolutions of the projectors are most of that, and neither
is needed for the losses to be what they are. See ``docs/benchmarks.md``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How much work the projectors and the tail are; the losses and their targets stay.

    Attributes:
        shared_views: One projector a stage answers for both views, so that one set of tokens
            passes the tail, and both losses compare what leaves it.
        depthwise_stem: See `CrossAttentionProjector`.
        ffn_ratio: Likewise.
    """

    shared_views: bool
    depthwise_stem: bool
    ffn_ratio: int


PUBLISHED = Form(shared_views=False, depthwise_stem=False, ffn_ratio=4)
"""The method as its authors released it."""

LIGHT = Form(shared_views=True, depthwise_stem=True, ffn_ratio=1)
"""At most twice a plain step for ResNet-50 and ViT-S/16 from Swin-L at 224 px, by FLOPs."""
