"""Views: one augmented crop of one sample each, drawn once and replayed to the pixel.

``draw`` resolves every random decision into a ``ViewParams``; ``render`` turns that and the
decoded image into pixels. Teacher and student both go through ``decode_image`` and ``render``, so
that the student sees the very pixels the teacher saw, and ``pixel_hash`` proves it.

    policy = ViewPolicy.parse("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25")
    image = decode_image(data, key=key)
    view = draw(policy, seed=0, key=key, pass_index=0,
                source_size=(image.height, image.width), view_size=(224, 224))
    pixels = render(image, view, view_size=(224, 224))
"""

from scalekd.views._columns import pack_views, unpack_view, view_columns
from scalekd.views._components import POLICY_GRAMMAR, CenterCrop, RandAugment, RandomCrop
from scalekd.views._decode import decode_image
from scalekd.views._draw import draw
from scalekd.views._environment import pixel_environment
from scalekd.views._lossless import decode_view, encode_view
from scalekd.views._operations import OPERATIONS
from scalekd.views._params import CropBox, EraseBox, Interpolation, Operation, ViewParams
from scalekd.views._policy import ViewPolicy
from scalekd.views._render import mean_difference, pixel_hash, render
from scalekd.views._resize import pillow_name

__all__ = [
    "OPERATIONS",
    "POLICY_GRAMMAR",
    "CenterCrop",
    "CropBox",
    "EraseBox",
    "Interpolation",
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
    "pixel_environment",
    "pixel_hash",
    "render",
    "unpack_view",
    "view_columns",
]
