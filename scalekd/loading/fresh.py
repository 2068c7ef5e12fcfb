"""Views of epochs beyond the passes of a cache, drawn during training for a live teacher.

A view depends only on seed, key and pass, so these are the views that `cache-teacher` would draw
with more passes. A run with a live teacher sees the same views, however many passes are cached.
"""

from scalekd.images.samples import Sample
from scalekd.loading.views import Pixels, ReplayContract, draw_view, replay_view


def fresh_pass(passes: tuple[int, ...], epoch: int) -> int | None:
    """Return the pass to draw in an epoch, or None if one of the cached ``passes`` is read.

    With all passes of a cache, the pass is the number of the epoch. With a part of the passes,
    new passes follow the last of them.
    """
    beyond = epoch - len(passes)
    return None if beyond < 0 else passes[-1] + 1 + beyond


def draw_fresh_view(
    sample: Sample, contract: ReplayContract, *, pass_index: int, view_size: tuple[int, int]
) -> tuple[Pixels, Pixels]:
    """Draw a view; return its pixels at ``view_size`` for the student, and those for the teacher.

    Raises:
        DataError: The image is corrupt.
    """
    view = draw_view(
        sample,
        contract.policy,
        seed=contract.seed,
        pass_index=pass_index,
        view_size=contract.view_size,
    )
    if view_size == contract.view_size:
        return view.pixels, view.pixels
    pixels = replay_view(sample, view.params, contract.policy, view_size=view_size)
    return pixels, view.pixels
