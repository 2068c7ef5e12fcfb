"""Check that an extension that is being written has the samples and views of its cache."""

from typing import Any

import numpy as np

from scalekd.cache import CacheReader
from scalekd.cache.documents.manifest import Identity
from scalekd.cache.layout import SAMPLES
from scalekd.cache.reading.extensions import check_fits
from scalekd.errors import CacheMismatch
from scalekd.pipelines._job import Job
from scalekd.pipelines._same_pixels import check_pixels


class ExtendedCache:
    """Compares an extension that is being written with the cache that it extends.

    Args:
        base: Reader of the cache that is extended.
    """

    def __init__(self, base: CacheReader) -> None:
        self._base = base

    @property
    def identity(self) -> Identity:
        """Identity of the cache that is extended."""
        return self._base.identity

    def check(self, job: Job) -> None:
        """Check, before the teacher runs, that a job draws the views of the cache.

        Raises:
            CacheMismatch: The teacher takes views of another size, or this machine draws other
                pixels.
        """
        spec, views = job.teacher.spec, self.identity.views
        if tuple(spec.img_size) != tuple(views.view_size):
            raise CacheMismatch(
                f"{self._base.location}: its views have {views.view_size} pixels, and {spec.model}"
                f" takes {spec.img_size}"
            )
        check_pixels(self._base.cache, job.drawn)

    def check_identity(self, identity: Identity) -> None:
        """Raise ``CacheMismatch`` unless samples, views and shards are those of the cache."""
        check_fits(self.identity, identity, where="what --name is to add")

    def check_shard(
        self, unit: int, shard: int, samples_sha256: str, pixel_hashes: np.ndarray[Any, Any]
    ) -> None:
        """Raise ``CacheMismatch`` unless a shard's samples and pixels are those of the cache."""
        record = self._base.record(SAMPLES, shard)
        where = f"{self._base.location}: shard {shard}"
        if samples_sha256 != record.samples_sha256:
            raise CacheMismatch(
                f"{where}: the images have other samples than those that the cache was made from;"
                " pass its --data-dir, --split and options"
            )
        first = int(self._base.samples.starts[shard])
        rows = self._base.read_rows(unit, first, record.num_rows, ["pixel_hash"])
        if not np.array_equal(rows["pixel_hash"], pixel_hashes):
            raise CacheMismatch(
                f"{where} of pass {unit}: this machine draws other pixels than the cache's teacher"
                " saw; add to it with the versions that `scalekd cache info` names"
            )
