"""Host time of a view that the cache contains, by how it is embedded, without targets.

Views of 224 px of ImageNet photographs, read by the loader in this process: drawn from JPEG files,
decoded from lossless WebP, and from differences of pixels, which the training device restores.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings, median, median_ratio, per, take_turns
from scalekd.cache import open_cache
from scalekd.codecs import create_logit_codec
from scalekd.loading import CachedViewLoader, cached_views
from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache
from scalekd.views import undo_differences

_BATCH = 64
_SIZE = (224, 224)
_GOAL_MS = 0.35


def run(settings: Settings) -> dict[str, Any]:
    base = _inputs.photograph_cache(
        settings,
        _inputs.swin_codec(settings),
        create_logit_codec("full", 1000),
        view_size=_SIZE,
    )
    images = _inputs.photographs(settings)
    data_dir = str(settings.work / "photographs")
    caches = {
        "images": base,
        "view, tars": _converted(settings, base, data_dir, "webdataset", "view"),
        "pixels, tars": _converted(settings, base, data_dir, "webdataset", "pixels"),
        "pixels, Zarr": _converted(settings, base, data_dir, "zarr", "pixels"),
    }
    num_views = len(open_cache(base).samples) // _BATCH * _BATCH
    turns = 3 if settings.quick else 7
    unused = {
        (name, differences): [
            CachedViewLoader(
                open_cache(root),
                images if name == "images" else None,
                batch_size=_BATCH,
                differences=differences,
            )
            for _ in range(turns + 1)
        ]
        for name, root in caches.items()
        for differences in ((True, False) if name.startswith("pixels") else (False,))
    }

    def epoch(key: tuple[str, bool]) -> None:
        for _ in unused[key].pop().epoch(0):
            pass

    checked = cached_views.CHECKED_BATCHES
    cached_views.CHECKED_BATCHES = 0  # an epoch has thousands of batches, of which 4 are checked
    try:
        costs = take_turns({_name(*key): _call(epoch, key) for key in unused}, turns)
    finally:
        cached_views.CHECKED_BATCHES = checked
    stored = torch.randint(0, 256, (_BATCH, 3, *_SIZE), dtype=torch.uint8)
    restoring = take_turns({"undo": lambda: undo_differences(stored)}, turns)["undo"]
    return {
        "views": num_views,
        "view_size": _SIZE,
        "goal_ms": _GOAL_MS,
        "bytes_per_view": {
            name: _image_bytes(root, base) for name, root in caches.items() if name != "images"
        },
        "per_view": {name: per(found, num_views) for name, found in costs.items()},
        "over_view": {
            name: median_ratio(found, costs["view, tars"], "cpu") for name, found in costs.items()
        },
        "undo_on_cpu_us": 1e6 * median(restoring).cpu / _BATCH,
    }


def _name(name: str, differences: bool) -> str:
    restored = name.startswith("pixels") and not differences
    return f"{name}, restored and checked on the host" if restored else name


def _call(work: Callable[[tuple[str, bool]], None], key: tuple[str, bool]) -> Callable[[], None]:
    return lambda: work(key)


def _converted(settings: Settings, base: Path, data_dir: str, form: str, embed: str) -> Path:
    root = settings.work / f"photographs-{form}-{embed}"
    convert_cache(
        ConvertConfig.model_validate(
            {
                "source": str(base),
                "output": str(root),
                "format": form,
                "embed": embed,
                "data_dir": data_dir,
                "workers": 0,
            }
        )
    )
    return root


def _image_bytes(root: Path, base: Path) -> float:
    """Bytes that a view's image or pixels add to the cache, with headers, padding and index."""
    sizes = [open_cache(path).manifest.total_bytes for path in (root, base)]
    return (sizes[0] - sizes[1]) / len(open_cache(base).samples)
