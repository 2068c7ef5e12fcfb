"""Image sets, under the name that they had up to version 0.2; see :mod:`scalekd.images`."""

from scalekd.images import ImageDataset, Sample, open_dataset

__all__ = ["ImageDataset", "Sample", "open_dataset"]
