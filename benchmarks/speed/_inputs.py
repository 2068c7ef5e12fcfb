"""Caches to measure with: of a real teacher, and of made-up targets, all really written."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._codec_files import load_codec, save_codec
from benchmarks.speed._measure import Settings
from scalekd.cache import codecs as stored
from scalekd.cache.cache import Cache
from scalekd.cache.codecs import save_arrays, stage_info
from scalekd.cache.documents.manifest import DataInfo, Identity, Plan, Provenance, ViewsInfo
from scalekd.cache.writing.finishing import finish
from scalekd.cache.writing.planning import begin_arrays, commit_plan
from scalekd.cache.writing.rows import SampleRows, ViewRows
from scalekd.cache.writing.writer import CacheWriter
from scalekd.codecs import FeatureCodec, LogitCodec, fit_codec
from scalekd.images import ImageDataset, open_dataset
from scalekd.loading.drawing import DrawnBatch, DrawnViews, DrawRequest
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._sizes import default_block_size, default_shard_size
from scalekd.pipelines.cache_teacher import cache_teacher
from scalekd.shapes import FeatureShape
from scalekd.teachers import TeacherConfig, TeacherSpec
from scalekd.views import ViewPolicy, pack_views, pixel_environment

POLICY = "crop+flip"
SWIN_L = FeatureShape((7, 7), 1536)
_COPIES = 6  # of each of the hundred photographs, under keys of their own


def teacher_config(settings: Settings) -> TeacherConfig:
    """The ViT-S/14 at 112 px that was fine-tuned on CIFAR-10."""
    folder = settings.data / "teacher" / "vit_small_patch14_112_cifar10"
    return TeacherConfig(model=f"local-dir:{folder}")


def cifar_views(settings: Settings) -> int:
    return 512 if settings.quick else 4096


def cifar_config(settings: Settings) -> CacheTeacherConfig:
    """What ``scalekd cache-teacher`` gets for the cache of :func:`cifar_cache`."""
    return CacheTeacherConfig(
        teacher=teacher_config(settings),
        data_dir=str(settings.data / "cifar10"),
        output=settings.work / "cifar-cache",
        aug=POLICY,
        limit=cifar_views(settings),
        workers=1,
    )


def cifar_cache(settings: Settings) -> Path:
    """Cache of CIFAR-10 views by the shipped pipeline, with the default options; written once."""
    config = cifar_config(settings)
    cache_teacher(config)  # returns at once when the cache is complete
    return config.output


def photographs(settings: Settings) -> ImageDataset:
    """The hundred ImageNet photographs, some times over, as class folders."""
    folder = settings.work / "photographs"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        for path in sorted((settings.data / "imagenet-sample").glob("*.JPEG")):
            target = partial / "train" / path.name.split("_")[0]
            target.mkdir(parents=True, exist_ok=True)
            for copy in range(_COPIES):
                shutil.copyfile(path, target / f"{path.stem}-{copy}.jpg")
        partial.rename(folder)
    return open_dataset(str(folder))


def begin_cache(
    root: Path,
    *,
    num_samples: int,
    view_size: tuple[int, int],
    codec: FeatureCodec,
    logits: LogitCodec,
    witnesses: np.ndarray[Any, Any],
    max_key_bytes: int,
    fingerprint: str = "0" * 64,
    batch_size: int = 64,
    shard_size: int | None = None,
) -> Cache:
    """Plan, tables and array metadata of a cache of one pass; see :func:`write_cache`."""
    shard_size = shard_size or default_shard_size(num_samples)
    path, digest = save_arrays(root, "witnesses", {"pixels": witnesses})
    identity = Identity(
        teacher=_teacher(codec.shape, view_size, logits.num_classes).model_dump(mode="json"),
        precision="fp32",
        batch_size=batch_size,
        request={"stages": [4], "logits": "full", "codec": codec.name},
        stages={"4": stage_info(codec, stored.commit_codec(root, codec, "stage4"))},
        logits=stored.commit_codec(root, logits, "logits"),
        tail=None,
        tail_digest=None,
        views=ViewsInfo(
            policy=ViewPolicy.parse(POLICY).to_config(),
            view_size=view_size,
            seed=0,
            environment=pixel_environment(),
            witnesses=path,
            witnesses_digest=digest,
        ),
        data=DataInfo(
            fingerprint=fingerprint, num_samples=num_samples, max_key_bytes=max_key_bytes
        ),
        skip_corrupt=False,
        shard_size=shard_size,
        block_size=default_block_size(shard_size),
    )
    plan = commit_plan(root, Plan.of(identity, Provenance(software={})))
    cache = Cache(root, plan)
    begin_arrays(root, plan, cache.layout, 1)
    return cache


def write_cache(
    root: Path,
    *,
    num_samples: int,
    view_size: tuple[int, int],
    codec: FeatureCodec,
    logits: LogitCodec,
    targets: Callable[[int, int], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
    rows: Callable[[int, int], ViewRows],
    witnesses: np.ndarray[Any, Any],
    max_key_bytes: int,
    fingerprint: str = "0" * 64,
) -> None:
    """Write a cache of one pass through the shipped writer, with targets from a function.

    Args:
        root: Folder of the cache.
        num_samples: Of the cache.
        view_size: Height and width the teacher is said to have seen.
        codec: Of the final stage.
        logits: Of the logits.
        targets: Features and logits of ``count`` views from ``first`` on.
        rows: All else of ``count`` views from ``first`` on.
        witnesses: Pixels of the first views.
        max_key_bytes: Of the keys.
        fingerprint: Of the image set.
    """
    cache = begin_cache(
        root,
        num_samples=num_samples,
        view_size=view_size,
        codec=codec,
        logits=logits,
        witnesses=witnesses,
        max_key_bytes=max_key_bytes,
        fingerprint=fingerprint,
    )
    identity = cache.identity
    shard_size = identity.shard_size
    with CacheWriter(cache) as writer:
        for shard in range(identity.num_shards):
            first, count = shard * shard_size, identity.rows_of(shard)
            open_shard = writer.shard(0, shard)
            for start, block in _blocks(first, count, identity.block_size):
                features, scores = targets(start, block)

                def encode(
                    features: np.ndarray[Any, Any] = features,
                    scores: np.ndarray[Any, Any] = scores,
                ) -> dict[str, np.ndarray[Any, Any]]:
                    return {
                        **{f"stage4/{n}": plane for n, plane in codec.encode(features).items()},
                        **{f"logits/{n}": plane for n, plane in logits.encode(scores).items()},
                    }

                open_shard.write_block(encode, rows(start, block))
            open_shard.commit(())
    if finish(cache, 1) is None:
        raise RuntimeError(f"{root}: the cache is not complete")


def write_plain_cache(
    root: Path,
    *,
    num_views: int,
    codec: FeatureCodec,
    logits: LogitCodec,
    targets: Callable[[int, int], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
) -> None:
    """A cache without images: keys, parameters and hashes of views are made up as well."""
    random = np.random.default_rng(1)

    def rows(first: int, count: int) -> ViewRows:
        return ViewRows(
            SampleRows(
                keys=tuple(f"{number:09d}" for number in range(first, first + count)),
                labels=random.integers(0, 10, count, np.int32),
                source_hashes=random.integers(0, 2**63, count, np.uint64),
            ),
            {
                "view/crop": random.integers(1, 200, (count, 4), np.uint16),
                "view/flip": random.integers(0, 2, count, np.uint8),
                "pixel_hash": random.integers(0, 2**63, count, np.uint64),
            },
        )

    write_cache(
        root,
        num_samples=num_views,
        view_size=(32, 32),
        codec=codec,
        logits=logits,
        targets=targets,
        rows=rows,
        witnesses=np.zeros((8, 32, 32, 3), np.uint8),
        max_key_bytes=9,
    )


def _blocks(first: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, count, size):
        yield first + offset, min(size, count - offset)


def _teacher(shape: FeatureShape, view_size: tuple[int, int], num_classes: int) -> TeacherSpec:
    return TeacherSpec(
        model="made-up",
        architecture="swin_large_patch4_window7_224",
        family="swin",
        weights_sha256="0" * 64,
        weights_source="random",
        img_size=view_size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        crop_pct=0.9,
        stages={
            3: FeatureShape((2 * shape.grid[0], 2 * shape.grid[1]), shape.num_channels),
            4: shape,
        },
        num_classes=num_classes,
        licence=None,
        model_kwargs={},
        tail_blocks=2,
    )


def made_up_features(shape: FeatureShape, num_views: int, *, seed: int) -> np.ndarray[Any, Any]:
    """Float16 features with a falling spectrum over the channels and smooth maps.

    Channels are mixed from 192 sources whose variance falls as ``1 / rank``; each token shares two
    thirds of its variance with its view's mean, roughly as real final-stage features do. What the
    transform codec makes of them is reported beside every figure that they enter.
    """
    random = np.random.default_rng(seed)
    num_sources = min(192, shape.num_channels)
    mixing = np.random.default_rng(0).standard_normal((num_sources, shape.num_channels))
    mixing *= np.arange(1, num_sources + 1)[:, None] ** -0.5
    own = random.standard_normal((num_views, shape.num_tokens, num_sources))
    common = random.standard_normal((num_views, 1, num_sources))
    features = (own + np.sqrt(2) * common).astype(np.float32) @ mixing.astype(np.float32)
    features += 0.02 * random.standard_normal(features.shape, dtype=np.float32)
    return features.astype(np.float16)


def full_rank_features(shape: FeatureShape, num_views: int, *, seed: int) -> np.ndarray[Any, Any]:
    """Float32 features of every channel's own source: 1.7 to 2 bits a value at 1 % error.

    Real features of Swin-L's stage 3 take 1.7.
    """
    random, channels = np.random.default_rng(seed), shape.num_channels
    mixing = np.random.default_rng(0).standard_normal((channels, channels), dtype=np.float32)
    mixing *= np.arange(1, channels + 1, dtype=np.float32)[:, None] ** -0.5
    own = random.standard_normal((num_views, shape.num_tokens, channels), dtype=np.float32)
    common = random.standard_normal((num_views, 1, channels), dtype=np.float32)
    return np.asarray((own + np.float32(0.7) * common) @ mixing)


def swin_codec(settings: Settings) -> FeatureCodec:
    """The default codec, fitted to made-up features of Swin-L's final stage; fitted once."""
    path = settings.work / "swin-codec.safetensors"
    if not path.exists():
        calibration = made_up_features(SWIN_L, 128, seed=0)
        save_codec(path, fit_codec("transform:error=0.01", SWIN_L, [calibration]))
    return load_codec(path, SWIN_L)


def photograph_cache(
    settings: Settings, codec: FeatureCodec, logits: LogitCodec, *, view_size: tuple[int, int]
) -> Path:
    """Views of the photographs with made-up targets of the codec's shape; written once a codec."""
    root = settings.work / f"photographs-{codec.name}"
    if root.exists():
        return root
    images = photographs(settings)
    policy = ViewPolicy.parse(POLICY)
    views = DrawnViews(images, policy, 0, view_size)
    first = views.draw(DrawRequest(0, 0, range(8)))
    random = np.random.default_rng(1)

    def targets(start: int, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        scores = random.standard_normal((count, logits.num_classes), dtype=np.float32)
        return made_up_features(codec.shape, count, seed=start + 1), 3 * scores

    def rows(start: int, count: int) -> ViewRows:
        return view_rows(views.draw(DrawRequest(0, 0, range(start, start + count))), policy)

    partial = root.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_cache(
        partial,
        num_samples=len(images),
        view_size=view_size,
        codec=codec,
        logits=logits,
        targets=targets,
        rows=rows,
        witnesses=first.pixels.permute(0, 2, 3, 1).numpy(),
        max_key_bytes=images.keys.dtype.itemsize,
        fingerprint=images.fingerprint,
    )
    partial.rename(root)
    return root


def view_rows(batch: DrawnBatch, policy: ViewPolicy) -> ViewRows:
    """What is stored of drawn views, beside their targets."""
    columns = pack_views(list(batch.params), policy)
    return ViewRows(
        SampleRows(batch.keys, batch.labels, batch.source_hashes),
        {
            **{f"view/{name}": column for name, column in columns.items()},
            "pixel_hash": batch.pixel_hashes,
        },
    )
