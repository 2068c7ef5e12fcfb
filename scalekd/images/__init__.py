"""Image sets: their samples, labels and class names."""

from scalekd.images.opening import open_dataset
from scalekd.images.samples import IMAGE_EXTENSIONS, ImageDataset, Sample
from scalekd.options import ImageOptions

__all__ = ["IMAGE_EXTENSIONS", "ImageDataset", "ImageOptions", "Sample", "open_dataset"]
