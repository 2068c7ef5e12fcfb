"""Normalisation of pixels, the same for students and teachers."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn


class Normalise(nn.Module):
    """Subtracts the mean and divides by the standard deviation, on the pixels' device.

    Args:
        mean: Mean per channel of pixels scaled to 0..1.
        std: Standard deviation per channel of pixels scaled to 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            scaled = torch.tensor(values, dtype=torch.float64) * 255
            self.register_buffer(name, scaled.float().view(1, -1, 1, 1), persistent=False)

    def forward(
        self, pixels: UInt8[Tensor, "batch 3 row column"]
    ) -> Float[Tensor, "batch 3 row column"]:
        return (pixels.to(self.mean.dtype) - self.mean) / self.std
