"""The identity of the cache that a job asks for."""

from scalekd.cache.manifest import ClassMap, DataInfo, Identity, ViewsInfo
from scalekd.codecs import parse_codec
from scalekd.images.samples import ImageDataset
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._calibrate import Calibration
from scalekd.teachers import Teacher
from scalekd.views import ViewPolicy, pixel_environment

BLOCK_SIZE = 256


def wanted_identity(
    config: CacheTeacherConfig,
    teacher: Teacher,
    images: ImageDataset,
    policy: ViewPolicy,
    made: Calibration | Identity,
    *,
    environment: dict[str, str] | None = None,
    class_map: ClassMap | None = None,
) -> Identity:
    """The identity of the cache asked for; files of tables come from ``made``.

    So do the versions that drew the views where ``made`` is the identity of a cache: whether this
    machine draws the same pixels is checked by drawing, not by comparing versions.
    """
    if isinstance(made, Identity):
        stages, logits = made.stages, made.logits
        tail, tail_digest = made.tail, made.tail_digest
        witnesses, witnesses_digest = made.views.witnesses, made.views.witnesses_digest
        environment = made.views.environment
    else:
        stages = {str(stage): info for stage, info in made.stages.items()}  # type: ignore[misc]
        logits = made.logits
        tail, tail_digest = made.tail
        witnesses, witnesses_digest = made.witnesses
    shard_size = config.shard_size or default_shard_size(len(images))
    return Identity(
        teacher=teacher.spec.model_dump(mode="json"),
        precision=config.precision,  # type: ignore[arg-type]  # auto was resolved
        batch_size=config.batch_size,
        request={
            "stages": list(config.stages),
            "logits": config.logits,
            "codec": str(parse_codec(config.codec)),
        },
        stages=stages,
        logits=logits,
        tail=tail,
        tail_digest=tail_digest,
        views=ViewsInfo(
            policy=policy.to_config(),
            view_size=teacher.spec.img_size,
            seed=config.seed,
            environment=environment or pixel_environment(),
            witnesses=witnesses,
            witnesses_digest=witnesses_digest,
        ),
        data=DataInfo(
            fingerprint=images.fingerprint,
            num_samples=len(images),
            max_key_bytes=images.keys.dtype.itemsize,
            class_names=images.class_names,
        ),
        skip_corrupt=config.skip_corrupt,
        shard_size=shard_size,
        block_size=config.block_size or default_block_size(shard_size),
        class_map=class_map,
    )


def default_block_size(shard_size: int) -> int:
    """Views a block: 256, or the most below it that cut the shard into whole blocks."""
    return next(size for size in range(BLOCK_SIZE, 0, -1) if shard_size % size == 0)


def default_shard_size(num_samples: int) -> int:
    """Views a shard: about 64 shards, of 1 to 16 whole blocks.

    Small shards divide small sets among processes; large ones keep the number of files of
    ImageNet's 1.28 million samples (313 shards) and the work lost in a crash in balance.
    """
    blocks = -(-num_samples // (64 * BLOCK_SIZE))
    return BLOCK_SIZE * min(16, blocks)
