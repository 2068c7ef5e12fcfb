"""Check an image set before a teacher runs over it: decode images, count classes and sizes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from pydantic import BaseModel

from scalekd.errors import DataError
from scalekd.images import ImageDataset, Sample
from scalekd.pipelines._progress import ProgressReport
from scalekd.views import decode_image

_AT_ONCE = 64  # images read before they are decoded
_SHOWN = 10


class ImageCheck(BaseModel):
    """Result of decoding images of a set.

    Attributes:
        num_decoded: Number of images that were read and decoded.
        num_unreadable: Number of these images that could not be read or decoded.
        problems: Messages about the first images that failed, one each.
        width: Smallest, median and largest width in pixels; ``None`` without a readable image.
        height: Smallest, median and largest height in pixels.
        total_bytes: Encoded size of the whole set.
        smallest_class: Name and number of images of the smallest class; ``None`` without labels.
        largest_class: Name and number of images of the largest class.
    """

    num_decoded: int
    num_unreadable: int
    problems: tuple[str, ...]
    width: tuple[int, int, int] | None
    height: tuple[int, int, int] | None
    total_bytes: int
    smallest_class: tuple[str, int] | None
    largest_class: tuple[str, int] | None

    def lines(self, num_samples: int) -> Iterator[str]:
        """Yield the result as lines of text; ``num_samples`` is the size of the whole set."""
        few = "" if self.num_decoded == num_samples else "; --images 0 decodes all"
        yield (
            f"{self.num_decoded:,} of {num_samples:,} images decoded,"
            f" {self.num_unreadable:,} unreadable{few}"
        )
        yield from (f"  {problem}" for problem in self.problems)
        if len(self.problems) < self.num_unreadable:
            yield f"  … and {self.num_unreadable - len(self.problems):,} more"
        if self.width and self.height:
            sides = " x ".join(
                f"{low:,}..{high:,} (median {median:,})"
                for low, median, high in (self.width, self.height)
            )
            yield f"width x height: {sides} px"
        yield f"encoded size: {self.total_bytes / 1e6:,.1f} MB"
        if self.smallest_class and self.largest_class:
            (small, few_), (large, many) = self.smallest_class, self.largest_class
            yield f"images of a class: from {few_:,} ({small}) to {many:,} ({large})"


def check_images(images: ImageDataset, num_images: int, num_threads: int) -> ImageCheck:
    """Decode images spread evenly over a set, and count its classes.

    Args:
        images: The image set.
        num_images: Number of images to decode; all if 0.
        num_threads: Number of images to decode at a time.
    """
    count = min(num_images or len(images), len(images))
    positions = np.linspace(0, len(images) - 1, count).round().astype(np.int64).tolist()
    sizes: list[tuple[int, int]] = []
    problems: list[str] = []
    with (
        ThreadPoolExecutor(max(1, num_threads)) as threads,
        ProgressReport("checking", count, "images", aside=lambda: f"{len(problems)} bad") as report,
    ):
        for start in range(0, count, _AT_ONCE):
            chunk = positions[start : start + _AT_ONCE]
            for outcome in threads.map(_decoded, images.read_many(chunk)):
                if isinstance(outcome, str):
                    problems.append(outcome)
                else:
                    sizes.append(outcome)
            report.advance(len(chunk))
    sides = np.array(sizes, np.int64).reshape(-1, 2)
    smallest, largest = _extreme_classes(images)
    return ImageCheck(
        num_decoded=count,
        num_unreadable=len(problems),
        problems=tuple(problems[:_SHOWN]),
        width=_spread(sides[:, 0]),
        height=_spread(sides[:, 1]),
        total_bytes=int(images.sizes.sum()),
        smallest_class=smallest,
        largest_class=largest,
    )


def _decoded(sample: Sample) -> tuple[int, int] | str:
    """Return width and height of an image, or why it cannot be decoded."""
    try:
        size: tuple[int, int] = decode_image(sample.image, key=sample.key).size
    except DataError as error:
        return str(error).partition(". Replace")[0]
    return size


def _spread(sides: np.ndarray[Any, Any]) -> tuple[int, int, int] | None:
    """Return the smallest, median and largest of ``sides``; ``None`` if it is empty."""
    if not len(sides):
        return None
    ordered = np.sort(sides)
    return int(ordered[0]), int(ordered[len(ordered) // 2]), int(ordered[-1])


def _extreme_classes(
    images: ImageDataset,
) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """Return name and number of images of the smallest and of the largest class."""
    labels = images.labels[images.labels >= 0]
    if not len(labels):
        return None, None
    counts = np.bincount(labels, minlength=images.num_classes)
    names = images.class_names or tuple(map(str, range(len(counts))))
    least, most = int(counts.argmin()), int(counts.argmax())
    return (names[least], int(counts[least])), (names[most], int(counts[most]))
