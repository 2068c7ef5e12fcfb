"""What a caching job finds out before it spends anything: avoidable errors, room on the disk."""

import contextlib
import os
import shutil
import uuid

import torch

from scalekd.cache.layout import MANIFEST_FILE, RECORDS_FOLDER, Layout
from scalekd.cache.manifest import Plan
from scalekd.cache.planning import check_form, read_plan
from scalekd.cache.selection import refuse_part
from scalekd.codecs import check_logit_codec, parse_codec
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.images import ImageDataset
from scalekd.loading import open_images
from scalekd.models.classes import Classes, classes_of_data
from scalekd.pipelines._arithmetic import auto_precision
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._identity import default_shard_size
from scalekd.storage import LocalStorage, Storage, make_local_cache, open_storage
from scalekd.storage.files import TEMPORARY_SUFFIX, remove_abandoned
from scalekd.teachers import resolve_model_name
from scalekd.views import ViewPolicy

_LEAST_COMPRESSED = {"float16": 0.8, "int8": 0.7, "int16": 0.05}  # of a plane's bytes, by type


def preflight(config: CacheTeacherConfig) -> tuple[ImageDataset, ViewPolicy, Classes]:
    """Find every avoidable error that costs nothing to find.

    Returns:
        The images to take, the views' policy, and the classes of the whole image set.
    """
    resolve_model_name(config.teacher.model)
    policy = ViewPolicy.parse(config.aug, interpolation=config.interpolation)
    parse_codec(config.codec)
    if config.logits is not None and config.logits != "none":
        check_logit_codec(config.logits)
    if config.embed != "none" and config.format != "webdataset":
        raise UsageError(f"--embed {config.embed}: only tars hold images; pass --format webdataset")
    plan = None if config.overwrite else read_plan(config.output)
    if not config.overwrite:
        if plan is not None:
            check_form(config.output, config.form)
        refuse_part(open_storage(config.output), "added to")
    elif config.shards is not None:
        raise UsageError(
            "--overwrite --shards: would delete the shards that other machines have done; delete"
            " the cache first, then start every part without --overwrite"
        )
    _check_writable(open_storage(config.output))
    kept = make_local_cache(config.local_cache, config.local_cache_size)
    images = open_images(
        config.data_dir, config.split, local_cache=kept, options=config.image_options
    )
    if plan is not None:
        fingerprint = plan.identity.data.fingerprint
        images = images.with_fingerprint(fingerprint, config.limit) or images
    classes = classes_of_data(images.place, images.class_names, images.labels)
    images = images.limited(config.limit)
    shard_size = config.shard_size or default_shard_size(len(images))
    _check_shards(config.shards, -(-len(images) // shard_size))
    return images, policy, classes


def with_precision(config: CacheTeacherConfig, device: torch.device) -> CacheTeacherConfig:
    """Decide what ``auto`` is: as the cache was begun, else what suits the device."""
    if config.precision != "auto":
        return config
    plan = None if config.overwrite else read_plan(config.output)
    precision = plan.identity.precision if plan else auto_precision(device)
    return config.model_copy(update={"precision": precision})


def _check_writable(place: Storage) -> None:
    """Refuse now what would otherwise fail when the teacher is loaded and the codecs are fitted."""
    if not isinstance(place, LocalStorage):
        if not place.exists(MANIFEST_FILE):
            probe = f"{RECORDS_FOLDER}/.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
            place.commit(probe, b"")
            with contextlib.suppress(EnvironmentFault):  # who may write need not may delete
                place.delete(probe)
        return
    output = place.root
    if (output / MANIFEST_FILE).exists():
        return  # complete, perhaps; if not, the first write says so
    standing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(standing, os.W_OK | os.X_OK):
        raise EnvironmentFault(
            f"--output {output}: {standing} cannot be written to (no permission, or a read-only"
            " file system); choose another folder or ask its owner"
        )


def _check_shards(shards: tuple[int, int] | None, num_shards: int) -> None:
    if shards is not None and not 0 <= shards[0] <= shards[1] < num_shards:
        raise UsageError(
            f"--shards {shards[0]}-{shards[1]}: the cache has shards 0 to {num_shards - 1}"
        )


def tidy_and_check_space(config: CacheTeacherConfig, plan: Plan, layout: Layout) -> None:
    """Remove what dead writers left; refuse to start a job that cannot fit on the disk."""
    if config.work_folder is not None:
        return  # it holds a shard at a time
    remove_abandoned(config.folder)
    records = sum(1 for _ in (config.folder / RECORDS_FOLDER).glob("[0-9]*/*.json"))
    missing = max(0, config.passes * plan.identity.num_shards - records) * plan.identity.shard_size
    views = min(missing, config.passes * plan.identity.data.num_samples)
    at_least = views * sum(
        array.bytes_per_view * _LEAST_COMPRESSED.get(array.dtype.name, 0.0)
        for array in layout.views
        if array.per_block
    )
    free = shutil.disk_usage(config.folder).free
    if free < at_least:
        raise EnvironmentFault(
            f"{config.output}: {free / 1e9:,.1f} GB are free, and {views:,} views need at least"
            f" {at_least / 1e9:,.1f} GB; free space, or choose fewer passes, --stages final or"
            " another --codec"
        )
