"""The contract of encoders that run on the teacher's device.

``FeatureCodec.encode`` encodes arrays in host memory. A codec may also have a *device encoder*, a
module that computes the same planes with torch operations, so that integers instead of features are
copied to the host. On a CPU its integers equal those of ``encode``, except for a few that rounding
changes; on a GPU products round differently, within the codec's error.

``forward`` does not wait for the device, so rare events are reported and not raised: the caller
checks :attr:`Encoding.finite` and :attr:`Encoding.octaves` once they are on the host.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Encoding(NamedTuple):
    """Planes of a batch on the device.

    Attributes:
        planes: Planes by name, ``(*shape_before, view, *shape_after)`` as stored, contiguous.
        finite: Whether the features of each token are finite, bool ``(view, token)``. The planes of
            a view with a token that is not finite are invalid.
        octaves: Power of two by which the features of each view must be divided to fit the planes,
            int16 ``(view,)``; 0 for almost all views. If one is not 0, encode again with them.
    """

    planes: dict[str, Tensor]
    finite: Tensor
    octaves: Tensor


class FeatureEncoder(nn.Module, ABC):
    """Base class of modules that encode a stage's features on their device."""

    @abstractmethod
    def forward(self, features: Tensor, octaves: Tensor | None = None) -> Encoding:
        """Encode a batch.

        The planes of a view depend on its index in the batch, but not on the other views or their
        number, because matrix products have a fixed shape.

        Args:
            features: Floating point ``(view, token, channel)``, prefix tokens first, of at most as
                many views as the encoder was made for.
            octaves: Sum of the octaves that earlier encodings of these features returned, int16
                ``(view,)``.
        """


def settled(encoder: FeatureEncoder, features: Tensor) -> Encoding:
    """Encode features repeatedly until every view fits its planes; waits for the device."""
    encoding: Encoding = encoder(features)
    octaves = encoding.octaves
    while bool(encoding.octaves.any()):
        encoding = encoder(features, octaves)
        octaves = octaves + encoding.octaves
    return encoding
