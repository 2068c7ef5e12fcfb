"""Encoding where the features are: the contract of encoders that run on the teacher's device.

``FeatureCodec.encode`` takes arrays of the host. A codec may also offer a *device encoder*, a
module that makes the same planes by torch operations, so that integers instead of features are
copied to the host. On a CPU it gives the integers of ``encode``, but for single ones at the edge of
rounding; on a GPU products round as the GPU does, within the codec's error.

Nothing in a forward waits for the device, so what is rare is reported and not raised: the caller
looks at :attr:`Encoding.finite` and :attr:`Encoding.octaves` once they are on the host.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Encoding(NamedTuple):
    """Planes of a batch on the device.

    Attributes:
        planes: By name, ``(*shape_before, view, *shape_after)`` as they are stored, contiguous.
        finite: bool ``(view, token)``: whether the features of a token are finite. The planes of a
            view with others are not to be used.
        octaves: int16 ``(view,)``: powers of two by which the features of a view must be divided
            to fit the planes, 0 for almost all. Encode again with them when one is not.
    """

    planes: dict[str, Tensor]
    finite: Tensor
    octaves: Tensor


class FeatureEncoder(nn.Module, ABC):
    """Encodes a stage's features on their device."""

    @abstractmethod
    def forward(self, features: Tensor, octaves: Tensor | None = None) -> Encoding:
        """Encode a batch.

        A view's planes depend on its place in the batch, but not on the other views or on their
        number: products have a fixed shape.

        Args:
            features: Floating point ``(view, token, channel)``, prefix tokens first; as many views
                as the encoder was made for, or fewer.
            octaves: int16 ``(view,)``, what earlier encodings of these features asked for.
        """


def settled(encoder: FeatureEncoder, features: Tensor) -> Encoding:
    """Encode until every view fits its planes; waits for the device."""
    encoding: Encoding = encoder(features)
    octaves = encoding.octaves
    while bool(encoding.octaves.any()):
        encoding = encoder(features, octaves)
        octaves = octaves + encoding.octaves
    return encoding
