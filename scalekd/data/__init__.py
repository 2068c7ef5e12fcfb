"""Image sets, views of them, and batches of views with targets."""

from scalekd.data._workers import worker_faults
from scalekd.data.index import open_dataset
from scalekd.data.loader import Batch, CachedViewLoader
from scalekd.data.samples import ImageDataset, Sample
from scalekd.data.views import draw_view, replay_view

__all__ = [
    "Batch",
    "CachedViewLoader",
    "ImageDataset",
    "Sample",
    "draw_view",
    "open_dataset",
    "replay_view",
    "worker_faults",
]
