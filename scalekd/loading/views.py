"""Draw and replay views: from an encoded image to the pixels of one view.

Caching calls :func:`draw_view`, which also returns the view's parameters; training calls
:func:`replay_view` with the parameters in the cache. Both decode and render in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalekd.cache import CacheReader, JoinedReader
from scalekd.errors import CacheCorrupt, CacheMismatch
from scalekd.images.samples import ImageDataset, Sample
from scalekd.views import (
    ViewParams,
    ViewPolicy,
    decode_image,
    draw,
    mean_difference,
    pixel_environment,
    pixel_hash,
    render,
    unpack_view,
)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
PIXEL_ADVICE = (
    "The student would train on pixels that the teacher never saw. Install the versions of the"
    " cache, or accept the drift with --allow-pixel-drift X (mean difference in levels of 255)"
)


@dataclass(frozen=True)
class DrawnView:
    """A view that was drawn for the first time.

    Attributes:
        params: Parameters that redraw the view.
        pixels: Pixels of the view, ``(height, width, 3)``.
        pixel_hash: xxh3-64 of the pixels.
    """

    params: ViewParams
    pixels: Pixels
    pixel_hash: int


def draw_view(
    sample: Sample,
    policy: ViewPolicy,
    *,
    seed: int,
    pass_index: int,
    view_size: tuple[int, int],
) -> DrawnView:
    """Draw one view of a sample.

    Raises:
        DataError: The image is corrupt.
    """
    image = decode_image(sample.image, key=sample.key)
    params = draw(
        policy,
        seed=seed,
        key=sample.key,
        pass_index=pass_index,
        source_size=(image.height, image.width),
        view_size=view_size,
    )
    pixels = render(image, params, view_size=view_size)
    return DrawnView(params, pixels, pixel_hash(pixels))


def replay_view(sample: Sample, params: ViewParams, *, view_size: tuple[int, int]) -> Pixels:
    """Redraw a stored view at the teacher's size or another size."""
    image = decode_image(sample.image, key=sample.key)
    return render(image, params, view_size=view_size)


def stored_params(
    arrays: Mapping[str, np.ndarray[Any, Any]], row: int, policy: ViewPolicy
) -> ViewParams:
    """Return the parameters of a view from rows of a cache's arrays, by name."""
    columns = {
        name.removeprefix("view/"): rows
        for name, rows in arrays.items()
        if name.startswith("view/")
    }
    return unpack_view(columns, row, policy)


def sample_positions(
    images: ImageDataset, reader: CacheReader | JoinedReader
) -> np.ndarray[Any, Any]:
    """Return the position of each sample of a cache in an image set.

    Raises:
        CacheMismatch: The image set lacks samples of the cache.
    """
    samples = reader.samples
    positions = images.positions(samples.keys)
    missing = np.flatnonzero(positions < 0)
    if len(missing):
        raise CacheMismatch(
            f"{images.location} lacks {len(missing):,} of the {len(samples):,} samples of the"
            f" cache, such as {samples.key(int(missing[0]))!r}; --data-dir must be the data set"
            " the cache was made from"
        )
    return positions


def check_stored_pixels(key: str, pixels: Pixels, expected_hash: int) -> None:
    """Raise ``CacheCorrupt`` if embedded pixels do not have the hash of their view."""
    stored_hash = pixel_hash(pixels)
    if stored_hash != expected_hash:
        raise CacheCorrupt(
            f"the embedded pixels of a view of sample {key} are not those that the teacher saw"
            f" (their hash is {stored_hash:016x}, and the cache has {expected_hash:016x}): the"
            " cache was written wrongly or changed; draw the views from the images instead"
            " (`scalekd cache convert --embed none`), or write it again"
        )


@dataclass(frozen=True)
class ReplayContract:
    """Draws views like those of a cache, and compares pixels with what the teacher saw.

    Attributes:
        policy: Policy of the cache's views.
        view_size: Height and width of the views that the teacher saw.
        seed: Seed of the cache's views.
        environment: Versions of the libraries that drew the cache's views.
        allowed_drift: Mean difference, in levels of 255, that the user accepts.
    """

    policy: ViewPolicy
    view_size: tuple[int, int]
    seed: int
    environment: dict[str, str]
    allowed_drift: float = 0.0

    @classmethod
    def of(
        cls, reader: CacheReader | JoinedReader, *, allowed_drift: float = 0.0
    ) -> "ReplayContract":
        """Return the contract of a cache."""
        views = reader.identity.views
        return cls(
            policy=reader.policy,
            view_size=views.view_size,
            seed=views.seed,
            environment=views.environment,
            allowed_drift=allowed_drift,
        )

    def draw(self, sample: Sample, pass_index: int) -> DrawnView:
        """Draw a sample's view of a pass, as :func:`draw_view` does."""
        return draw_view(
            sample, self.policy, seed=self.seed, pass_index=pass_index, view_size=self.view_size
        )

    def check_source(self, sample: Sample, expected_hash: int) -> None:
        """Raise ``CacheMismatch`` unless this is the image file that the teacher saw."""
        if sample.source_hash != expected_hash:
            raise CacheMismatch(
                f"sample {sample.key} is another image than the one the teacher saw (hash of its"
                f" encoded bytes {sample.source_hash:016x} here, {expected_hash:016x} in the"
                " cache). Pass the data set that the cache was made from as --data-dir"
            )

    def check_pixels(self, key: str, pixels: Pixels, expected_hash: int) -> None:
        """Raise ``CacheMismatch`` if redrawn pixels do not have the hash in the cache.

        With a positive :attr:`allowed_drift` any difference is accepted, because the drift of this
        machine was measured on the witnesses.

        Args:
            key: Key of the sample, for the message.
            pixels: Pixels of the view at :attr:`view_size`.
            expected_hash: Pixel hash in the cache.
        """
        redrawn_hash = pixel_hash(pixels)
        if redrawn_hash == expected_hash or self.allowed_drift > 0:
            return
        raise CacheMismatch(
            f"this machine redraws a view of sample {key} differently (pixel hash"
            f" {expected_hash:016x} in the cache, {redrawn_hash:016x} here; {self._versions()})."
            f" {PIXEL_ADVICE}"
        )

    def check_witnesses(self, samples: Sequence[Sample], pixels: Sequence[Pixels]) -> float:
        """Redraw the witnesses, the views whose pixels the cache stores, and measure the drift.

        Args:
            samples: Samples of the witnesses.
            pixels: Stored pixels of the witnesses, which are views of pass 0.

        Returns:
            Mean absolute difference in levels of 255; zero means that every pixel is the same.

        Raises:
            CacheMismatch: The difference is larger than :attr:`allowed_drift`.
        """
        if self.allowed_drift > 0 and not samples:
            raise CacheMismatch(
                "the cache contains no witness views, so drift cannot be measured or accepted;"
                " leave out --allow-pixel-drift"
            )
        drift = 0.0
        for sample, seen in zip(samples, pixels, strict=True):
            drift = max(drift, mean_difference(self.draw(sample, 0).pixels, seen))
        if drift > self.allowed_drift:
            raise CacheMismatch(
                f"this machine redraws the cache's {len(samples)} witness views with a mean"
                f" difference of up to {drift:.3g}/255 ({self._versions()}). {PIXEL_ADVICE}"
            )
        return drift

    def _versions(self) -> str:
        """Describe how the versions that draw views differ from those of the cache."""
        here = pixel_environment()
        names = sorted(here.keys() | self.environment.keys())
        changed = [
            f"{name} {self.environment.get(name)} in the cache, {here.get(name)} here"
            for name in names
            if here.get(name) != self.environment.get(name)
        ]
        return "; ".join(changed) or "all recorded versions are the same"
