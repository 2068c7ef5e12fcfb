"""Image sets: their samples, labels and class names."""

from scalekd.images.index import open_dataset
from scalekd.images.samples import ImageDataset, Sample

__all__ = ["ImageDataset", "Sample", "open_dataset"]
