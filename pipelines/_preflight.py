"""Checks before a caching job starts: its options, its output location and the disk space."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from scalekd.cache.documents.manifest import Plan
from scalekd.cache.documents.selection import refuse_part
from scalekd.cache.forms import Form
from scalekd.cache.layout import MANIFEST_FILE, RECORDS_FOLDER, Layout
from scalekd.cache.writing.planning import check_form, read_plan
from scalekd.codecs import check_logit_codec
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.storage import Storage
from scalekd.storage.files import TEMPORARY_SUFFIX, remove_abandoned
from scalekd.teachers import resolve_model_name

_LEAST_COMPRESSED = {"float16": 0.8, "int8": 0.7, "int16": 0.05}  # of a plane's bytes, by type


def check_options(config: CacheTeacherConfig, *, named: bool = True) -> None:
    """Check teacher, logits and shards as far as possible without reading a file.

    Args:
        config: Options of the job.
        named: Whether the teacher is loaded by its name, which is then checked.
    """
    if named:
        resolve_model_name(config.teacher.model)
    if config.logits is not None and config.logits != "none":
        check_logit_codec(config.logits)
    if config.overwrite and config.shards is not None:
        raise UsageError(
            "--overwrite --shards: would delete the shards that other machines have done; delete"
            " the cache first, then start every part without --overwrite"
        )


def check_output(output: Storage, form: Form, *, overwrite: bool) -> Plan | None:
    """Check that a cache in ``form`` can be written at ``output``.

    Returns:
        The plan of the cache to continue; ``None`` for a new cache, or one to overwrite.

    Raises:
        UsageError: ``output`` contains other files, or a partial copy of a cache.
        CacheMismatch: The existing cache is in another form.
        EnvironmentFault: ``output`` is not writable.
    """
    plan = None
    if not overwrite:
        plan = read_plan(output)
        if plan is not None:
            check_form(output, form)
        refuse_part(output, "added to")
    _check_writable(output)
    return plan


def _check_writable(storage: Storage) -> None:
    """Raise if ``storage`` is not writable, before the teacher is loaded and codecs are fitted."""
    if storage.root is None:
        if not storage.exists(MANIFEST_FILE):
            probe = f"{RECORDS_FOLDER}/.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
            storage.commit(probe, b"")
            with contextlib.suppress(EnvironmentFault):  # permission to delete may be missing
                storage.delete(probe)
        return
    output = storage.root
    if (output / MANIFEST_FILE).exists():
        return  # probably complete; otherwise the first write reports the error
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise EnvironmentFault(
            f"--output {output}: {existing} cannot be written to (no permission, or a read-only"
            " file system); choose another folder or ask its owner"
        )


def check_shards(shards: tuple[int, int] | None, num_shards: int) -> None:
    """Raise ``UsageError`` if a range names shards that the cache does not have."""
    if shards is not None and not 0 <= shards[0] <= shards[1] < num_shards:
        raise UsageError(
            f"--shards {shards[0]}-{shards[1]}: the cache has shards 0 to {num_shards - 1}"
        )


def tidy_and_check_space(folder: Path, plan: Plan, layout: Layout, num_passes: int) -> None:
    """Remove temporary files of killed writers, and check that the job fits on the disk.

    Args:
        folder: Folder of the cache.
        plan: Plan of the cache.
        layout: Layout of the cache.
        num_passes: Number of passes of the finished cache.

    Raises:
        EnvironmentFault: The disk has too little free space.
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
