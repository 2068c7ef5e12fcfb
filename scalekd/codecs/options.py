"""Options of the transform codec, and the number of calibration views they need."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape

Metric = Literal["spatial", "frequency", "raw"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Gain = Literal["token", "view"]
GAINS: tuple[Gain, ...] = get_args(Gain)

# Calibration takes at least 150 tokens per channel, from at least 500 images (measured: fewer
# images cost more than fewer tokens, because tokens of one image are similar). A quarter more is
# held out from the bases, to find the step on views that did not contribute to them.
_TOKENS_PER_CHANNEL = 150
_MIN_VIEWS = 500
_MAX_VIEWS = 8192
# Limit of the memory of calibration views in float32.
_MAX_BYTES = 3 << 30


@dataclass(frozen=True)
class TransformOptions:
    """The target error of the transform codec.

    Attributes:
        error: Mean relative squared error to reach, in ``metric``; 0.01 is one per cent.
        metric: Name of the error: one of those in :mod:`scalekd.codecs.measure`.
    """

    error: float = 0.01
    metric: Metric = "spatial"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.error) and 1e-6 <= self.error <= 0.5):
            raise UsageError(f"transform codec: error={self.error} is not between 1e-6 and 0.5")
        if self.metric not in METRICS:
            raise UsageError(
                f"transform codec: metric={self.metric!r} is not one of {', '.join(METRICS)}"
            )

    @classmethod
    def parse(cls, text: str) -> "TransformOptions":
        """Read ``error=0.01,metric=spatial``; either part may be left out."""
        options: dict[str, str] = {}
        for part in filter(None, text.split(",")):
            key, separator, value = part.partition("=")
            if not separator or key not in ("error", "metric") or key in options:
                raise UsageError(
                    f"transform codec: {part!r} is not an option; give "
                    "transform[:error=0.01][,metric=spatial|frequency|raw]"
                )
            options[key] = value
        try:
            error = float(options.get("error", "0.01"))
        except ValueError as fault:
            raise UsageError(
                f"transform codec: error={options['error']!r} is not a number"
            ) from fault
        metric = options.get("metric", "spatial")
        return cls(error, metric)  # type: ignore[arg-type]  # __post_init__ checks

    def num_calibration_views(self, shape: FeatureShape) -> int:
        """Return the number of views for a good fit, or fewer if they would exceed 3 GiB."""
        wanted = math.ceil(_TOKENS_PER_CHANNEL * shape.num_channels / shape.num_patch_tokens)
        fitting = _MAX_BYTES // (4 * shape.num_tokens * shape.num_channels)
        views = min(math.ceil(1.25 * max(wanted, _MIN_VIEWS)), _MAX_VIEWS)
        return max(min(views, fitting), 64)

    def __str__(self) -> str:
        return f"error={self.error:g},metric={self.metric}"
