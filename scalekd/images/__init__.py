"""Image sets: their samples, labels and class names."""

from scalekd.image_options import ImageOptions
from scalekd.images.opening import open_dataset
from scalekd.images.samples import IMAGE_EXTENSIONS, ImageDataset, Sample

__all__ = ["IMAGE_EXTENSIONS", "ImageDataset", "ImageOptions", "Sample", "open_dataset"]
