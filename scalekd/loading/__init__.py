"""Batches of views, drawn for a teacher or replayed from a cache with their targets."""

from scalekd.loading._workers import worker_faults
from scalekd.loading.cached_views import Batch
from scalekd.loading.embedded import open_images
from scalekd.loading.loader import CachedViewLoader
from scalekd.loading.views import draw_view, replay_view

__all__ = ["Batch", "CachedViewLoader", "draw_view", "open_images", "replay_view", "worker_faults"]
