"""Views of epochs that a cache has no pass for: drawn in training, for a live teacher.

They are what `cache-teacher` would have drawn with more passes, since a view depends on seed, key
and pass alone: a run with a live teacher sees the same pictures whatever was cached of them.
"""

from scalekd.images.samples import Sample
from scalekd.loading.views import Pixels, ReplayContract, draw_view, replay_view


def fresh_pass(passes: tuple[int, ...], epoch: int) -> int | None:
    """Pass to draw in an epoch, or None where one of the ``passes`` is read.

    With all passes of a cache it is the epoch's own number; a part of a cache that lacks some goes
    on behind its last.
    """
    beyond = epoch - len(passes)
    return None if beyond < 0 else passes[-1] + 1 + beyond


def draw_fresh_view(
    sample: Sample, contract: ReplayContract, *, pass_index: int, view_size: tuple[int, int]
) -> tuple[Pixels, Pixels]:
    """The pixels for a student of ``view_size``, and those for the teacher.

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
