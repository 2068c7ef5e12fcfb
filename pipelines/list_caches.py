"""Which caches stand below a folder or in a bucket, and what each holds.

    scalekd cache ls s3://lab/caches

Manifests and plans are read, and records counted, no more; so a cache of any size costs little.

Nothing is verified here but the documents themselves: `scalekd cache verify` reads the data.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel

from scalekd.cache.documents import FORMAT, MAX_JSON_BYTES, Model, parse_committed
from scalekd.cache.extensions import extension_names, extension_path
from scalekd.cache.layout import (
    EXTENSIONS_FOLDER,
    MANIFEST_FILE,
    PLAN_FILE,
    RECORDS_FOLDER,
    SAMPLES,
)
from scalekd.cache.manifest import Manifest, Plan
from scalekd.cache.selection import read_selection
from scalekd.errors import CacheCorrupt, CacheError, DataError
from scalekd.storage import Location, NotStored, Storage, StoredFileError, open_storage

State = Literal["complete", "part", "begun", "damaged"]


class ListedCache(BaseModel):
    """One line of ``scalekd cache ls``; what a damaged cache does not tell is ``None``.

    Attributes:
        path: Folder of the cache.
        state: ``complete``; ``part`` when only a part of a complete one was fetched; ``begun`` when
            shards are missing; ``damaged`` when its documents are.
        problem: What is wrong with a damaged one.
        part: Which part of the cache is there.
        cache_id: Hash of all that decides its bytes.
        teacher: Its name.
        data: The data set's fingerprint.
        num_samples: Samples of the data set.
        num_passes: Complete passes; of a cache that was only begun, those asked for.
        progress: Share of the shards that are committed.
        stages: Stages whose features are kept.
        codec: Their codec.
        errors: Mean relative squared error of the spatial target, by stage, as measured.
        logits: Kind of the logits.
        total_bytes: Of all files but records and manifest; of complete ones alone.
        age_seconds: Since the last document was written.
        licence: Of the teacher's weights.
        note: Of the maker.
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

    def cells(self, size: Callable[[float], str]) -> tuple[str, ...]:
        """A row under :data:`COLUMNS`; ``size`` writes a number of bytes."""
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
            "?" if self.total_bytes is None else size(self.total_bytes),
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


def list_caches(root: Location, *, max_depth: int = 4) -> list[ListedCache]:
    """Find the caches below a place, the place itself included, ordered by path.

    Symbolic links are not followed, and what lies inside a cache is not searched, but for
    its extensions.

    Args:
        root: Where to look.
        max_depth: Levels of folders below ``root`` to look into.

    Raises:
        DataError: There is nothing at ``root``.
        UsageError: The place cannot be listed, such as a web server.
    """
    storage = open_storage(root)
    found = list(_below(storage, max_depth, time.time()))
    if not found and not storage.folders() and next(storage.list(), None) is None:
        raise DataError(f"{storage.place}: there is nothing; name a folder with caches below it")
    return found


def _below(storage: Storage, depth: int, now: float) -> Iterator[ListedCache]:
    """The cache at a place, with its extensions; or those below it, in order of their names."""
    inner = [name for name in storage.folders() if not name.startswith(".")]
    listed = _look(storage, inner, now)
    if listed is not None:
        yield listed
        if EXTENSIONS_FOLDER in inner:
            for name in extension_names(storage):
                place = storage.below(extension_path(name))
                yield from _below(place, 0, now)
    elif depth > 0:
        for name in inner:
            yield from _below(storage.below(name), depth - 1, now)


def _look(storage: Storage, inner: list[str], now: float) -> ListedCache | None:
    """What the documents at one place tell; ``None`` where there never was a cache.

    Args:
        storage: The place.
        inner: Names of the folders there.
        now: Seconds since 1970.
    """
    told: dict[str, Any] = {"path": storage.place}
    try:
        manifest = _document(storage, MANIFEST_FILE, Manifest)
        plan = manifest.plan if manifest else _document(storage, PLAN_FILE, Plan)
        if plan is None:
            if RECORDS_FOLDER not in inner or SAMPLES not in storage.folders(RECORDS_FOLDER):
                return None
            raise CacheCorrupt(f"{storage.place}: neither {PLAN_FILE} nor {MANIFEST_FILE} is left")
        told |= _told(plan)
        if manifest is None:
            return ListedCache(**told, **_progress(storage, plan, now), state="begun")
        if _document(storage, PLAN_FILE, Plan) != manifest.plan:
            raise CacheCorrupt(f"{storage.locate(PLAN_FILE)}: not the plan in the manifest")
        part = read_selection(storage)
        newest = max(_records(storage, f"/{manifest.num_passes - 1:04d}"), default=None)
    except (CacheError, StoredFileError) as error:
        return ListedCache(**told, state="damaged", problem=str(error))
    return ListedCache(
        **told,
        state="complete" if part is None or part.is_all else "part",
        part=str(part) if part and not part.is_all else None,
        num_passes=manifest.num_passes,
        total_bytes=manifest.total_bytes,
        age_seconds=None if newest is None else now - newest,
    )


def _document(storage: Storage, name: str, model: type[Model]) -> Model | None:
    """A document of a cache; ``None`` when it is missing, or is of something else."""
    try:
        data = storage.read(name, max_bytes=MAX_JSON_BYTES)
    except NotStored:
        return None
    if name == MANIFEST_FILE and FORMAT.encode() not in data and not storage.exists(PLAN_FILE):
        return None  # web applications have a manifest.json, too
    return parse_committed(model, data, where=storage.locate(name))


def _told(plan: Plan) -> dict[str, Any]:
    """What a plan tells of a cache."""
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
        "errors": {stage: found for stage, found in errors.items() if found is not None},
        "logits": str(identity.request.get("logits")) if identity.logits else None,
        "licence": provenance.licence,
        "note": provenance.note,
    }


def _progress(storage: Storage, plan: Plan, now: float) -> dict[str, Any]:
    """How far a cache is that was begun: passes with metadata are those asked for."""
    asked = max(1, sum(name.isdigit() for name in storage.folders("passes")))
    committed = list(_records(storage, ""))
    return {
        "num_passes": asked,
        "progress": len(committed) / (plan.identity.num_shards * asked),
        "age_seconds": now - max(committed) if committed else None,
    }


def _records(storage: Storage, below: str) -> Iterator[float]:
    """When the records of passes were written; ``below`` narrows to one pass."""
    for stored in storage.list(f"{RECORDS_FOLDER}{below}"):
        folder = stored.path.split("/")[1]
        if stored.path.endswith(".json") and folder.isdigit():
            yield stored.modified


def _age(seconds: float) -> str:
    """``5 min``, ``3 h``, ``12 days``."""
    for limit, size, unit in ((3600, 60, "min"), (2 * 86400, 3600, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
