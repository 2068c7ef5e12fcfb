"""Batches of views, drawn for a teacher or replayed from a cache with their targets."""

from scalekd.loading._workers import worker_faults
from scalekd.loading.loader import Batch, CachedViewLoader
from scalekd.loading.views import draw_view, replay_view

__all__ = ["Batch", "CachedViewLoader", "draw_view", "replay_view", "worker_faults"]
