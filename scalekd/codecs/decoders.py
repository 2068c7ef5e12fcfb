"""Modules that decode stored planes on the training device.

They are not in the modules of the codecs, so that reading the documents of a cache loads no torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class FeatureDecoder(nn.Module, ABC):
    """Base class of modules that decode planes, view axis first, to features on their device."""

    @abstractmethod
    def forward(self, planes: Mapping[str, Tensor]) -> Tensor:
        """Decode a batch.

        Args:
            planes: Planes by name, each ``(view, *shape_before, *shape_after)``.

        Returns:
            float32 ``(view, token, channel)``, prefix tokens first.
        """


class LogitDecoder(nn.Module, ABC):
    """Base class of modules that decode planes of logits, view axis first, for a loss."""

    @abstractmethod
    def forward(self, planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode a batch; the class of the codec documents the returned tensors."""


class Float16Decoder(FeatureDecoder):
    """Decodes half precision to single precision."""

    def forward(self, planes: Mapping[str, Tensor]) -> Tensor:
        return planes["values"].float()


class Int8Decoder(FeatureDecoder):
    """Multiplies codes by the scale of their token."""

    def forward(self, planes: Mapping[str, Tensor]) -> Tensor:
        return planes["codes"].float() * planes["scales"].float()[..., None]


class FullDecoder(LogitDecoder):
    """Decodes the logits of all classes; see :class:`~scalekd.codecs.FullLogitCodec`."""

    def forward(self, planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": planes["values"].float()}


class TopKDecoder(LogitDecoder):
    """Decodes the likeliest classes; see :class:`~scalekd.codecs.TopKLogitCodec`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        log_sum_exp = planes["log_sum_exp"].float()
        return {
            # Only damaged data has an index beyond the last class.
            "indices": planes["indices"].long().clamp(max=self.num_classes - 1),
            "log_probs": planes["scores"].float() - log_sum_exp[:, None],
            "log_sum_exp": log_sum_exp,
            "tail_mass": planes["tail_mass"].float(),
        }
