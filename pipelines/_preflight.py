"""What a caching job finds out before it spends anything: avoidable errors, room on the disk."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from scalekd.cache.forms import Form
from scalekd.cache.layout import MANIFEST_FILE, RECORDS_FOLDER, Layout
from scalekd.cache.manifest import Plan
from scalekd.cache.planning import check_form, read_plan
from scalekd.cache.selection import refuse_part
from scalekd.codecs import check_logit_codec, parse_codec
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.storage import Location, Storage, open_storage
from scalekd.storage.files import TEMPORARY_SUFFIX, remove_abandoned
from scalekd.teachers import resolve_model_name
from scalekd.views import ViewPolicy

_LEAST_COMPRESSED = {"float16": 0.8, "int8": 0.7, "int16": 0.05}  # of a plane's bytes, by type


def check_options(config: CacheTeacherConfig, *, named: bool = True) -> None:
    """Find every error in the options that shows without looking at any file.

    Args:
        config: The options.
        named: Whether the teacher is to be found by its name.
    """
    if named:
        resolve_model_name(config.teacher.model)
    ViewPolicy.parse(config.aug, interpolation=config.interpolation)
    parse_codec(config.codec)
    if config.logits is not None and config.logits != "none":
        check_logit_codec(config.logits)
    if config.embed != "none" and config.format != "webdataset":
        raise UsageError(f"--embed {config.embed}: only tars hold images; pass --format webdataset")
    if config.overwrite and config.shards is not None:
        raise UsageError(
            "--overwrite --shards: would delete the shards that other machines have done; delete"
            " the cache first, then start every part without --overwrite"
        )


def check_output(output: Location, form: Form, *, overwrite: bool) -> Plan | None:
    """Check that a cache in ``form`` can be written at ``output``.

    Returns:
        The plan of the cache that is to be finished; ``None`` for a new one.

    Raises:
        UsageError: Something else is there, or a part of a cache.
        CacheMismatch: The cache was begun in another form.
        EnvironmentFault: It cannot be written to.
    """
    storage = open_storage(output)
    plan = None
    if not overwrite:
        plan = read_plan(storage)
        if plan is not None:
            check_form(storage, form)
        refuse_part(storage, "added to")
    _check_writable(storage)
    return plan


def _check_writable(place: Storage) -> None:
    """Refuse now what would otherwise fail when the teacher is loaded and the codecs are fitted."""
    if place.root is None:
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


def check_shards(shards: tuple[int, int] | None, num_shards: int) -> None:
    """Raise ``UsageError`` if a range names shards that the cache does not have."""
    if shards is not None and not 0 <= shards[0] <= shards[1] < num_shards:
        raise UsageError(
            f"--shards {shards[0]}-{shards[1]}: the cache has shards 0 to {num_shards - 1}"
        )


def tidy_and_check_space(folder: Path, plan: Plan, layout: Layout, num_passes: int) -> None:
    """Remove what dead writers left; refuse to start a job that cannot fit on the disk.

    Args:
        folder: Folder of the cache.
        plan: Plan of the cache.
        layout: Layout of the cache.
        num_passes: Passes to have in the end.
    """
    remove_abandoned(folder)
    records = sum(1 for _ in (folder / RECORDS_FOLDER).glob("[0-9]*/*.json"))
    missing = max(0, num_passes * plan.identity.num_shards - records) * plan.identity.shard_size
    views = min(missing, num_passes * plan.identity.data.num_samples)
    at_least = views * sum(
        array.bytes_per_view * _LEAST_COMPRESSED.get(array.dtype.name, 0.0)
        for array in layout.views
        if array.per_block
    )
    free = shutil.disk_usage(folder).free
    if free < at_least:
        raise EnvironmentFault(
            f"{folder}: {free / 1e9:,.1f} GB are free, and {views:,} views need at least"
            f" {at_least / 1e9:,.1f} GB; free space, or choose fewer passes, --stages final or"
            " another --codec"
        )
