"""The loader with targets against the same loader without, in this process and in workers.

Two image sets: CIFAR-10 (a kilobyte each, 112 px views, a ViT-S) and ImageNet photographs
(100 KB each, 224 px views, made-up targets of Swin-L's shape). The first is the harder test of
reading targets: its images cost next to nothing. The limit is the loader without targets.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings, median, median_ratio, per, take_turns
from scalekd.cache import CacheReader, open_cache
from scalekd.codecs import create_logit_codec
from scalekd.images import ImageDataset, open_dataset
from scalekd.loading import CachedViewLoader, replay_view
from scalekd.views import unpack_view

_BATCH = 64
_TARGETS = ("stage4", "logits")


def run(settings: Settings) -> dict[str, Any]:
    cifar = open_cache(_inputs.cifar_cache(settings))
    made_up = _inputs.photograph_cache(
        settings,
        _inputs.swin_codec(settings),
        create_logit_codec("full", 1000),
        view_size=(224, 224),
    )
    return {
        "batch_size": _BATCH,
        "sets": {
            "cifar10, ViT-S/14 at 112 px": _measure(
                settings, cifar, open_dataset(str(settings.data / "cifar10"))
            ),
            "photographs, Swin-L's shape at 224 px": _measure(
                settings, open_cache(made_up), _inputs.photographs(settings)
            ),
        },
    }


def _measure(settings: Settings, reader: CacheReader, images: ImageDataset) -> dict[str, Any]:
    def loader(groups: tuple[str, ...], workers: int) -> CachedViewLoader:
        return CachedViewLoader(
            reader, images, batch_size=_BATCH, num_workers=workers, groups=groups
        )

    def epochs(workers: int) -> dict[str, Callable[[], object]]:
        """Each epoch with a loader of its own, made beforehand: one that was used keeps blocks."""
        unused = {
            name: [loader(groups, workers) for _ in range(turns + 1)]
            for name, groups in (("with", _TARGETS), ("without", ()))
        }

        def epoch(name: str) -> None:
            fresh = unused[name].pop()
            count = sum(1 for _ in fresh.epoch(0))
            if count != fresh.num_batches:
                raise RuntimeError(f"{count} batches of {fresh.num_batches}")

        return {"with": lambda: epoch("with"), "without": lambda: epoch("without")}

    turns = 3 if settings.quick else 7
    num_views = len(reader.samples) // _BATCH * _BATCH
    alone = take_turns(
        {
            **epochs(0),
            "decode_and_crop": lambda: _decode_and_crop(reader, images, num_views),
        },
        turns,
    )
    workers = take_turns(epochs(2), turns)
    extra = median(alone["with"]).cpu - median(alone["without"]).cpu
    return {
        "views": num_views,
        "target_bytes_per_view": _target_bytes(reader),
        "per_view": {name: per(found, num_views) for name, found in alone.items()},
        "rate_with_over_without": 1 / median_ratio(alone["with"], alone["without"], "cpu"),
        "target_reading_over_decode_and_crop": extra / median(alone["decode_and_crop"]).cpu,
        "two_workers": {
            "wall_us": {
                name: 1e6 * median(found).wall / num_views for name, found in workers.items()
            },
            "rate_with_over_without": 1 / median_ratio(workers["with"], workers["without"], "wall"),
        },
    }


def _decode_and_crop(reader: CacheReader, images: ImageDataset, num_views: int) -> None:
    positions = images.positions(reader.samples.keys)
    names = [array.name for array in reader.layout.views if array.name.startswith("view/")]
    size = reader.identity.views.view_size
    done = 0
    for first, count in reader.blocks():
        columns = {
            name.removeprefix("view/"): rows
            for name, rows in reader.read_rows(0, first, count, names).items()
        }
        for row in range(min(count, num_views - done)):
            sample = images[int(positions[first + row])]
            params = unpack_view(columns, row, reader.policy)
            replay_view(sample, params, view_size=size)
        done += min(count, num_views - done)


def _target_bytes(reader: CacheReader) -> float:
    """Bytes of files that a view's targets take."""
    total = 0
    for shard in range(reader.identity.num_shards):
        files = reader.record(0, shard).files
        total += sum(
            found.num_bytes for path, found in files.items() if path.split("/")[2] in _TARGETS
        )
    return total / len(reader.samples)
