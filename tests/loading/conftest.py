"""A cache of every augmentation, with the views of its teacher and the teacher's outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

POLICY = "crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.5"


class Heard(NamedTuple):
    """One view as it entered the teacher, and the teacher's float32 answer."""

    pixels: np.ndarray
    features: dict[int, np.ndarray]
    logits: np.ndarray


class Recorded(NamedTuple):
    root: Path
    views: dict[tuple[int, str], Heard]


@pytest.fixture(scope="session")
def recorded(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Two passes; ``views[pass, key]`` was noted at the teacher's door. Read only."""
    from scalekd.pipelines import _write_shards as stage_one

    views: dict[tuple[int, str], Heard] = {}
    add = stage_one._OpenShard.add

    def note(self: Any, batch: Any, output: Any) -> None:
        for row, key in enumerate(batch.keys):
            views[batch.request.pass_index, key] = Heard(
                batch.pixels[row].numpy().copy(),
                {stage: found[row].copy() for stage, found in output.features.items()},
                output.logits[row].copy(),
            )
        add(self, batch, output)

    root = tmp_path_factory.mktemp("recorded") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_one._OpenShard, "add", note)
        make_cache(root, aug=POLICY)
    return Recorded(root, views)
