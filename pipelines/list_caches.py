"""List the caches below a folder or in a bucket, with their contents.

    scalekd cache ls s3://lab/caches

Only manifests and plans are read, and records are counted, so the cost of a cache does not depend
on its size. The documents are validated; `scalekd cache verify` checks the data.
"""

import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from scalekd.cache.documents import FORMAT, MAX_JSON_BYTES, Model, parse_committed
from scalekd.cache.documents.manifest import Manifest, Plan
from scalekd.cache.documents.selection import read_selection
from scalekd.cache.layout import (
    EXTENSIONS_FOLDER,
    MANIFEST_FILE,
    PLAN_FILE,
    RECORDS_FOLDER,
    SAMPLES,
)
from scalekd.cache.reading.extensions import extension_names, extension_path
from scalekd.errors import CacheCorrupt, CacheError, DataError
from scalekd.storage import Location, NotStored, Storage, StoredFileError, open_storage
from scalekd.text import format_bytes, table

State = Literal["complete", "part", "begun", "damaged"]


class ListedCache(BaseModel):
    """One line of ``scalekd cache ls``; fields that a damaged cache does not provide are ``None``.

    Attributes:
        path: Folder of the cache.
        state: ``complete``; ``part`` when only a part of a complete one was fetched; ``begun`` when
            shards are missing; ``damaged`` when its documents are.
        problem: Description of the damage; ``None`` unless the state is ``damaged``.
        part: Which part of the cache is there.
        cache_id: Hash of everything that determines the bytes of the cache.
        teacher: Name of the teacher.
        data: Fingerprint of the data set.
        num_samples: Number of samples of the data set.
        num_passes: Number of complete passes; while shards are missing, of requested passes.
        progress: Fraction of the shards that are committed.
        stages: Stages whose features are stored.
        codec: Codec of the features.
        errors: Mean relative squared error of the spatial target, by stage, as measured.
        logits: Codec of the logits.
        total_bytes: Size of all files except records and manifest; only for complete caches.
        age_seconds: Seconds since the last document was written.
        licence: Licence of the teacher's weights.
        note: Text given with ``--note`` when the cache was written.
    """

    path: str
    state: State
    problem: str | None = None
    part: str | None = None
    cache_id: str | None = None
    teacher: str | None = None
    data: str | None = None
    num_samples: int | None = None
    num_passes: int | None = None
    progress: float | None = None
    stages: tuple[str, ...] = ()
    codec: str | None = None
    errors: dict[str, float] = {}
    logits: str | None = None
    total_bytes: int | None = None
    age_seconds: float | None = None
    licence: str | None = None
    note: str | None = None

    def cells(self) -> tuple[str, ...]:
        """Return a row under :data:`COLUMNS`."""
        state: str = self.state
        if self.progress is not None and self.state == "begun":
            state = f"begun, {self.progress:.0%}"
        errors = "/".join(f"{error:.2%}" for error in self.errors.values())
        return (
            self.path,
            state,
            self.teacher or "?",
            f"{self.data[:12]}, {self.num_samples:,}" if self.data else "?",
            f"{self.num_passes or '?'}",
            ",".join(self.stages) or "none",
            f"{self.codec or 'none'}" + (f" ({errors})" if errors else ""),
            self.logits or "none",
            "?" if self.total_bytes is None else format_bytes(self.total_bytes),
            "?" if self.age_seconds is None else _age(self.age_seconds),
            self.licence or "not stated",
        )


COLUMNS = (
    "cache",
    "state",
    "teacher",
    "data, samples",
    "passes",
    "stages",
    "codec (error)",
    "logits",
    "size",
    "age",
    "licence",
)


class CacheList(BaseModel):
    """Result of ``scalekd cache ls``."""

    root: str = Field(exclude=True)
    caches: tuple[ListedCache, ...]

    def lines(self) -> list[str]:
        """Return a table with a line for each cache, and its remarks below it."""
        if not self.caches:
            return [f"no cache below {self.root}"]
        header, *rows = table([COLUMNS, *(cache.cells() for cache in self.caches)])
        lines = [header]
        for row, cache in zip(rows, self.caches, strict=True):
            lines.append(row)
            remarks = {"problem": cache.problem, "part": cache.part, "note": cache.note}
            lines += [f"  {name}: {text}" for name, text in remarks.items() if text]
        return lines


def list_caches(root: Location, *, max_depth: int = 4) -> list[ListedCache]:
    """Return the cache at ``root`` or the caches below it, ordered by path.

    Symbolic links are not followed. Folders inside a cache are not searched, except those of its
    extensions.

    Args:
        root: Folder or URL to search.
        max_depth: Number of folder levels below ``root`` to search.

    Raises:
        DataError: ``root`` does not exist or is empty.
        UsageError: ``root`` cannot be listed, as on a web server.
    """
    storage = open_storage(root)
    caches = list(_below(storage, max_depth, time.time()))
    if not caches and not storage.folders() and next(storage.list(), None) is None:
        raise DataError(
            f"{storage.location}: does not exist or is empty; name a folder that contains caches"
        )
    return caches


def _below(storage: Storage, depth: int, now: float) -> Iterator[ListedCache]:
    """Yield the cache in ``storage`` and its extensions, or else the caches below, by name."""
    inner = [name for name in storage.folders() if not name.startswith(".")]
    listed = _look(storage, inner, now)
    if listed is not None:
        yield listed
        if EXTENSIONS_FOLDER in inner:
            for name in extension_names(storage):
                extension = storage.below(extension_path(name))
                yield from _below(extension, 0, now)
    elif depth > 0:
        for name in inner:
            yield from _below(storage.below(name), depth - 1, now)


def _look(storage: Storage, inner: list[str], now: float) -> ListedCache | None:
    """Describe the cache in ``storage`` from its documents; ``None`` if it is not a cache.

    Args:
        storage: Folder or URL of the possible cache.
        inner: Names of the folders in ``storage``.
        now: Current time in seconds since 1970.
    """
    fields: dict[str, Any] = {"path": storage.location}
    try:
        manifest = _document(storage, MANIFEST_FILE, Manifest)
        plan = manifest.plan if manifest else _document(storage, PLAN_FILE, Plan)
        if plan is None:
            if RECORDS_FOLDER not in inner or SAMPLES not in storage.folders(RECORDS_FOLDER):
                return None
            raise CacheCorrupt(
                f"{storage.location}: neither {PLAN_FILE} nor {MANIFEST_FILE} is left"
            )
        fields |= _plan_fields(plan)
        if manifest is None:
            return ListedCache(**fields, **_progress(storage, plan, now), state="begun")
        if _document(storage, PLAN_FILE, Plan) != manifest.plan:
            raise CacheCorrupt(f"{storage.locate(PLAN_FILE)}: not the plan in the manifest")
        part = read_selection(storage)
        newest = max(_records(storage, f"/{manifest.num_passes - 1:04d}"), default=None)
    except (CacheError, StoredFileError) as error:
        return ListedCache(**fields, state="damaged", problem=str(error))
    return ListedCache(
        **fields,
        state="complete" if part is None or part.is_all else "part",
        part=str(part) if part and not part.is_all else None,
        num_passes=manifest.num_passes,
        total_bytes=manifest.total_bytes,
        age_seconds=None if newest is None else now - newest,
    )


def _document(storage: Storage, name: str, model: type[Model]) -> Model | None:
    """Read a document of a cache; ``None`` if it is missing or belongs to another program."""
    try:
        data = storage.read(name, max_bytes=MAX_JSON_BYTES)
    except NotStored:
        return None
    if name == MANIFEST_FILE and FORMAT.encode() not in data and not storage.exists(PLAN_FILE):
        return None  # web applications have a manifest.json, too
    return parse_committed(model, data, where=storage.locate(name))


def _plan_fields(plan: Plan) -> dict[str, Any]:
    """Return the fields of :class:`ListedCache` that a plan provides."""
    identity, provenance = plan.identity, plan.provenance
    errors = {
        stage: provenance.measured.get(stage, {}).get("spatial", {}).get("mean")
        for stage in identity.stages
    }
    return {
        "cache_id": plan.cache_id,
        "teacher": str(identity.teacher["model"]),
        "data": identity.data.fingerprint,
        "num_samples": identity.data.num_samples,
        "stages": tuple(identity.stages),
        "codec": str(identity.request.get("codec")) if identity.stages else None,
        "errors": {stage: error for stage, error in errors.items() if error is not None},
        "logits": str(identity.request.get("logits")) if identity.logits else None,
        "licence": provenance.licence,
        "note": provenance.note,
    }


def _progress(storage: Storage, plan: Plan, now: float) -> dict[str, Any]:
    """Return the progress of an incomplete cache; a requested pass is one with metadata."""
    asked = max(1, sum(name.isdigit() for name in storage.folders("passes")))
    committed = list(_records(storage, ""))
    return {
        "num_passes": asked,
        "progress": len(committed) / (plan.identity.num_shards * asked),
        "age_seconds": now - max(committed) if committed else None,
    }


def _records(storage: Storage, below: str) -> Iterator[float]:
    """Yield the modification times of the records of passes, restricted to the path ``below``."""
    for stored in storage.list(f"{RECORDS_FOLDER}{below}"):
        folder = stored.path.split("/")[1]
        if stored.path.endswith(".json") and folder.isdigit():
            yield stored.modified


def _age(seconds: float) -> str:
    """Format a duration, such as ``5 min``, ``3 h`` or ``12 days``."""
    for limit, size, unit in ((3600, 60, "min"), (2 * 86400, 3600, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
