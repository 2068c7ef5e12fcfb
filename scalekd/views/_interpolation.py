"""Names of the resize filters, for records that load no image library."""

from typing import Literal

Interpolation = Literal["bicubic", "bilinear", "bilinear-opencv"]
