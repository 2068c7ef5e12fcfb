"""``cache-teacher`` against the bare teacher's forward on the same views, already decoded.

Three arms over the same batches: ``forward`` calls the teacher and nothing else; ``write`` is the
shipped pipeline from pixels to committed shards; ``draw_and_write`` decodes and draws the
views too, in a worker process. The teacher's thread is what a run waits for: where coders and
workers have cores of their own, ``thread`` seconds are the wall's. The limit is 1.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings, median_ratio, per, take_turns
from scalekd.cache.cache import Cache
from scalekd.cache.codecs import CacheCodecs
from scalekd.cache.documents.manifest import Plan
from scalekd.cache.layout import PLAN_FILE, TABLES_FOLDER, Layout
from scalekd.cache.writing.planning import begin_arrays, read_plan
from scalekd.cache.writing.writer import CacheWriter
from scalekd.images import open_dataset
from scalekd.loading.drawing import DrawnBatch, DrawnViews, DrawRequest, shard_requests
from scalekd.pipelines._progress import ProgressReport
from scalekd.pipelines._write_shards import run_teacher, write_claimed
from scalekd.teachers import load_teacher
from scalekd.views import ViewPolicy


class _HeldViews(DrawnViews):
    """Views that were drawn before, handed out again."""

    def hold(self, requests: list[DrawRequest]) -> list[DrawnBatch]:
        held = {request.samples: super(_HeldViews, self).draw(request) for request in requests}
        object.__setattr__(self, "held", held)
        return list(held.values())

    def draw(self, request: DrawRequest) -> DrawnBatch:
        found: DrawnBatch = self.held[request.samples]  # type: ignore[attr-defined]
        return found


def run(settings: Settings) -> dict[str, Any]:
    root, config = _inputs.cifar_cache(settings), _inputs.cifar_config(settings)
    teacher = load_teacher(config.teacher)
    plan = read_plan(root)
    if plan is None:
        raise RuntimeError(f"{root}: the cache was not begun")
    codecs = CacheCodecs.load(root, plan.identity)
    layout = Cache(root, plan).layout
    num_views = 256 if settings.quick else 1024
    shards = [(0, shard) for shard in range(num_views // plan.identity.shard_size)]
    images = open_dataset(config.data_dir).limited(config.limit)
    drawn = (images, ViewPolicy.parse(config.aug), config.seed, teacher.spec.img_size)
    held = _HeldViews(*drawn)
    requests = list(
        shard_requests(
            shards,
            num_samples=len(images),
            shard_size=plan.identity.shard_size,
            batch_size=config.batch_size,
        )
    )
    batches = held.hold(requests)
    turns = 2 if settings.quick else 5
    begun = settings.work / "begun"
    shutil.rmtree(begun, ignore_errors=True)
    # Begun beforehand: metadata and tables are written once a cache, however many views it has.
    ready = [_begin(begun / str(number), root, plan, layout) for number in range(2 * (turns + 1))]

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                teacher(batch.pixels)

    def write(views: DrawnViews, workers: int) -> None:
        with (
            CacheWriter(Cache(ready.pop(), plan, codecs=codecs)) as writer,
            ProgressReport("", num_views, enabled=False) as progress,
        ):
            job = SimpleNamespace(teacher=teacher, drawn=views, precision="fp32", workers=workers)
            write_claimed(job, writer, codecs, shards, progress)

    with torch.inference_mode():
        teacher(batches[0].pixels)
    costs = take_turns(
        {
            "forward": forward,
            "write": lambda: write(held, 0),
            "draw_and_write": lambda: write(DrawnViews(*drawn), 1),
        },
        turns,
        warm_up=not settings.quick,
    )
    shutil.rmtree(begun)
    features = run_teacher(teacher, batches[0].pixels, "fp32")
    return {
        "teacher": teacher.spec.model,
        "view_size": teacher.spec.img_size,
        "views": num_views,
        "stages": sorted(codecs.stages),
        "per_view": {name: per(found, num_views) for name, found in costs.items()},
        "over_forward": {
            name: {
                clock: median_ratio(costs[name], costs["forward"], clock)
                for clock in ("wall", "cpu", "thread")
            }
            for name in ("write", "draw_and_write")
        },
        "parts_us": _parts(codecs, features.features, features.logits),
    }


def _begin(copy: Path, root: Path, plan: Plan, layout: Layout) -> Path:
    """A cache with the plan and tables of another, and no shard."""
    (copy / TABLES_FOLDER).mkdir(parents=True)
    shutil.copyfile(root / PLAN_FILE, copy / PLAN_FILE)
    shutil.copytree(root / TABLES_FOLDER, copy / TABLES_FOLDER, dirs_exist_ok=True)
    begin_arrays(copy, plan, layout, 1)
    return copy


def _parts(
    codecs: CacheCodecs,
    features: dict[int, np.ndarray[Any, Any]],
    logits: np.ndarray[Any, Any] | None,
) -> dict[str, float]:
    """Processor microseconds a view of what the coding threads do to a block."""
    parts = {"transform and quantise": 0.0, "entropy coding": 0.0}
    for stage, codec in codecs.stages.items():
        block = np.concatenate([features[stage]] * 4)
        planes, seconds = _timed(lambda: codec.encode(block))  # noqa: B023
        parts["transform and quantise"] += 1e6 * seconds / len(block)
        packed, seconds = _timed(lambda: codec.pack(planes))  # noqa: B023
        parts["entropy coding"] += 1e6 * seconds / len(block)
    if logits is not None and codecs.logits is not None:
        planes, seconds = _timed(lambda: codecs.logits.encode(logits))  # type: ignore[union-attr]
        parts["transform and quantise"] += 1e6 * seconds / len(logits)
        packed, seconds = _timed(lambda: codecs.logits.pack(planes))  # type: ignore[union-attr]
        parts["entropy coding"] += 1e6 * seconds / len(logits)
    del packed
    return parts


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    work()
    started = time.process_time()
    result = work()
    return result, time.process_time() - started
