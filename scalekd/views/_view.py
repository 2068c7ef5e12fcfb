"""Views with resolved parameters: drawing, storage as arrays, and rendering to pixels.

A view is one geometry followed by steps, whose numbers the cache stores exactly. Geometry does not
depend on the size at which a view is rendered: a crop is a box in source pixels, an erased box a
fraction of the view. A student can therefore replay a view at another resolution than the teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scalekd.errors import CacheCorrupt, UsageError
from scalekd.views._component import MAX_SIDE, Columns, Step, Triple
from scalekd.views._crop import CropBox, Middle
from scalekd.views._interpolation import Interpolation
from scalekd.views._policy import ViewPolicy
from scalekd.views._random import view_words

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewParams:
    """All parameters of a view; with source image and size they determine its pixels.

    Attributes:
        geometry: The part of the source image that is cut.
        steps: Steps applied to the cut view, in order.
        interpolation: Filter of the resize, and of rotation, shear and translation.
        mean: RGB mean in 0..1: fill colour of geometric operations, and mean of the noise.
        std: RGB standard deviation of the noise, in 0..1.

    Raises:
        ValueError: A number is outside its range.
    """

    geometry: CropBox | Middle
    steps: tuple[Step, ...] = ()
    interpolation: Interpolation
    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        self.geometry.check()
        for step in self.steps:
            step.check()

    @property
    def fill(self) -> tuple[int, int, int]:
        """RGB colour that rotation, shear and translation fill empty pixels with."""
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        return red, green, blue

    def of(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """Return the steps of a type, such as ``Operation``, in their order."""
        return tuple(step for step in self.steps if isinstance(step, kind))


def draw(
    policy: ViewPolicy,
    *,
    seed: int,
    key: str,
    pass_index: int,
    source_size: tuple[int, int],
    view_size: tuple[int, int],
) -> ViewParams:
    """Draw one view of one sample.

    Every component reads its own words, so that changing one component does not affect the draws of
    the others.

    Args:
        policy: Distribution of the views.
        seed: Seed of the cache, in 0..2**64 - 1.
        key: Key of the sample.
        pass_index: Index of the pass over the samples, from 0.
        source_size: Height and width of the decoded image, in pixels.
        view_size: Height and width for which the view is drawn, in pixels; only erased boxes depend
            on it, whose sides are whole pixels at this size.

    Returns:
        The view; equal arguments give equal views on every machine.

    Raises:
        UsageError: A size or the seed is out of range.
    """
    if not all(1 <= side <= MAX_SIDE for side in (*source_size, *view_size)):
        raise UsageError(
            f"sample {key}: a view of {view_size} px from an image of {source_size} px: "
            f"sides must be in 1..{MAX_SIDE}"
        )
    ends = [
        part.first_word + part.num_words for part in policy.parts if part.first_word is not None
    ]
    shared = view_words(seed, key, pass_index, max(ends, default=0))
    steps: list[Any] = []
    for part in policy.parts:
        if part.first_word is not None:
            words = shared[part.first_word : part.first_word + part.num_words]
        else:
            words = view_words(seed, key, pass_index, part.num_words, component=part.name)
        steps += part.draw(words, source_size, view_size)
    return _view(policy, steps)


def _view(policy: ViewPolicy, steps: Sequence[Any]) -> ViewParams:
    return ViewParams(
        geometry=steps[0],
        steps=tuple(steps[1:]),
        interpolation=policy.interpolation,
        mean=policy.mean,
        std=policy.std,
    )


def render(
    image: Image.Image, params: ViewParams, *, view_size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Compute the pixels of a view, for the teacher and for every replay.

    Args:
        image: Decoded source image, RGB, which is not changed.
        params: The view, just drawn or read from a cache.
        view_size: Height and width in pixels. At the size for which the view was drawn, replays are
            identical to the first rendering; at another size, the same part of the image is shown,
            with other noise of the same distribution.

    Returns:
        uint8 array (height, width, 3), writable, not normalised.

    Raises:
        ValueError: ``image`` is not RGB or ``view_size`` is out of range.
        DataError: The crop box is not inside the image, so the view is of another image; or the
            enlarged image of a centre view would have too many pixels.
    """
    if image.mode != "RGB":
        raise ValueError(f"views are drawn from RGB images, not {image.mode}; use decode_image")
    if not all(1 <= side <= MAX_SIDE for side in view_size):
        raise ValueError(f"a view's sides must be in 1..{MAX_SIDE}, not {view_size}")
    view = params.geometry.cut(image, params, view_size)
    for step in params.steps:
        view = step.apply(view, params)
    return np.array(view)


def view_columns(policy: ViewPolicy) -> Columns:
    """Return the arrays that store views of ``policy``: little-endian dtype and shape of one row.

    Only parameters that the policy varies are stored: a policy without flips has no ``flip``, and a
    deterministic one has no arrays. Steps that were not drawn are stored as zeros.
    """
    return {name: array for part in policy.parts for name, array in part.columns().items()}


def pack_views(views: Sequence[ViewParams], policy: ViewPolicy) -> dict[str, NDArray[Any]]:
    """Store views in arrays whose first axis is the view.

    Args:
        views: Views drawn from ``policy``.
        policy: Policy that determines the arrays.

    Returns:
        The arrays of ``view_columns``.

    Raises:
        ValueError: A view cannot have been drawn from ``policy``, so the arrays cannot store it.
    """
    columns: dict[str, NDArray[Any]] = {
        name: np.zeros((len(views), *shape), dtype)
        for name, (dtype, shape) in view_columns(policy).items()
    }
    for row, view in enumerate(views):
        try:
            for part in policy.parts:
                steps = [s for s in (view.geometry, *view.steps) if isinstance(s, part.steps)]
                for name, value in part.pack(steps).items():
                    if name in columns:
                        columns[name][row] = value
            # Reading each row back takes ten microseconds and detects every loss.
            fits = unpack_view(columns, row, policy) == view
        except (ValueError, CacheCorrupt):
            fits = False
        if not fits:
            raise ValueError(f"{view} is not a view of {policy}")
    return columns


def unpack_view(columns: Mapping[str, NDArray[Any]], row: int, policy: ViewPolicy) -> ViewParams:
    """Read one view back, exactly as it was drawn.

    Args:
        columns: The arrays of ``view_columns(policy)``.
        row: Index of the view.
        policy: The policy that the views were drawn from.

    Raises:
        CacheCorrupt: The row has numbers that no draw gives.
    """
    record = {name: columns[name][row].tolist() for name in view_columns(policy)}
    try:
        return _view(policy, [step for part in policy.parts for step in part.unpack(record)])
    except ValueError as error:
        raise CacheCorrupt(f"the parameters of view {row} are damaged: {error}") from None
