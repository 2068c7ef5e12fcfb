"""Views: augmented crops of samples, drawn once and replayed with identical pixels.

``draw`` resolves every random decision into a ``ViewParams``; ``render`` turns that and the
decoded image into pixels. Teacher and student both use ``decode_image`` and ``render``, so that the
student gets the same pixels as the teacher, and ``pixel_hash`` verifies it.

    policy = ViewPolicy.parse("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25")
    image = decode_image(data, key=key)
    view = draw(policy, seed=0, key=key, pass_index=0,
                source_size=(image.height, image.width), view_size=(224, 224))
    pixels = render(image, view, view_size=(224, 224))
"""

from typing import TYPE_CHECKING

from scalekd._lazy import lazy

if TYPE_CHECKING:
    from scalekd.views._component import Component
    from scalekd.views._crop import CenterCrop, CropBox, Middle, RandomCrop
    from scalekd.views._decode import decode_image
    from scalekd.views._differences import pixel_differences, undo_differences
    from scalekd.views._erase import Erase, EraseBox
    from scalekd.views._flip import Flip, Mirror
    from scalekd.views._interpolation import Interpolation
    from scalekd.views._jitter import Adjustment, ColorJitter
    from scalekd.views._lossless import decode_view, encode_view
    from scalekd.views._pixels import mean_difference, pixel_environment, pixel_hash
    from scalekd.views._policy import COMPONENTS, POLICY_GRAMMAR, ViewPolicy
    from scalekd.views._rand import OPERATIONS, Operation, RandAugment
    from scalekd.views._resize import pillow_name
    from scalekd.views._view import ViewParams, draw, pack_views, render, unpack_view, view_columns

__all__ = [
    "COMPONENTS",
    "OPERATIONS",
    "POLICY_GRAMMAR",
    "Adjustment",
    "CenterCrop",
    "ColorJitter",
    "Component",
    "CropBox",
    "Erase",
    "EraseBox",
    "Flip",
    "Interpolation",
    "Middle",
    "Mirror",
    "Operation",
    "RandAugment",
    "RandomCrop",
    "ViewParams",
    "ViewPolicy",
    "decode_image",
    "decode_view",
    "draw",
    "encode_view",
    "mean_difference",
    "pack_views",
    "pillow_name",
    "pixel_differences",
    "pixel_environment",
    "pixel_hash",
    "render",
    "undo_differences",
    "unpack_view",
    "view_columns",
]

__getattr__ = lazy(__name__, __file__)
