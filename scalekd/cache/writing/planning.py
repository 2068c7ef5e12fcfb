"""Begin a cache (form, plan, array metadata), and remove one."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Identity, Plan
from scalekd.cache.documents.stored import read_document
from scalekd.cache.files import holds
from scalekd.cache.forms import Form, read_form
from scalekd.cache.forms.images import IMAGES_FILE
from scalekd.cache.forms.store import unit_documents
from scalekd.cache.forms.webdataset.form import FORM_FILE, INFO_FILE
from scalekd.cache.layout import (
    COMPANIONS,
    EXTENSIONS_FOLDER,
    MANIFEST_FILE,
    PLAN_FILE,
    RECORDS_FOLDER,
    SAMPLES,
    SELECTION_FOLDER,
    TABLES_FOLDER,
    Layout,
)
from scalekd.cache.tables import table_files
from scalekd.cache.writing.lease import live_lease
from scalekd.cache.writing.publish import remove_remote
from scalekd.errors import CacheMismatch, EnvironmentFault, UsageError
from scalekd.storage import Location, Storage, open_storage
from scalekd.storage.files import TEMPORARY_SUFFIX, explained

_EARLY_NAMES = frozenset({TABLES_FOLDER, FORM_FILE, IMAGES_FILE})
"""Names at the top of a cache that are written before its plan."""

_NAMES = _EARLY_NAMES | {
    *(PLAN_FILE, MANIFEST_FILE, INFO_FILE, "zarr.json"),
    *(SAMPLES, "passes", RECORDS_FOLDER, EXTENSIONS_FOLDER, SELECTION_FOLDER),
}

_FORM_ADVICE = (
    "give the same --format and --embed to finish it, choose another --output, or --overwrite"
)


def read_plan(location: Location) -> Plan | None:
    """Return the plan of the cache at a location, or ``None`` if no cache was begun there.

    Raises:
        UsageError: The location is a file, or a folder with files that are not part of a cache.
    """
    storage = open_storage(location)
    if storage.root is not None:
        if not storage.root.exists():
            return None
        if not storage.root.is_dir():
            raise UsageError(
                f"{storage.location} is a file; --output expects the folder of a cache"
            )
    if not storage.exists(PLAN_FILE):
        if storage.root is not None:
            _refuse_unexpected(storage.root, _EARLY_NAMES)
        return None
    return read_document(storage, PLAN_FILE, Plan, "the plan")


def _refuse_unexpected(root: Path, names: frozenset[str]) -> None:
    unexpected = [
        entry.name
        for entry in root.iterdir()
        if entry.name not in {*names, *COMPANIONS} and not entry.name.endswith(TEMPORARY_SUFFIX)
    ]
    tables = root / TABLES_FOLDER
    if tables.is_dir():
        unexpected += [
            f"{TABLES_FOLDER}/{entry.name}"
            for entry in tables.iterdir()
            if not entry.name.endswith((".safetensors", TEMPORARY_SUFFIX))
        ]
    if unexpected:
        raise UsageError(
            f"{root} contains files that are not part of a cache"
            f" ({', '.join(sorted(unexpected)[:3])}); choose an empty or new folder"
        )


def remove_cache(location: Location) -> None:
    """Delete a complete, incomplete or damaged cache with its extensions.

    The plan is deleted last, so that an interrupted removal can be repeated.

    Raises:
        UsageError: The location contains other files, or another job is writing to it; nothing was
            deleted.
    """
    storage = open_storage(location)
    if storage.root is None:
        remove_remote(storage, _NAMES)
        return
    root = storage.root
    if not root.exists():
        return
    if not root.is_dir() or not (root / PLAN_FILE).exists():
        read_plan(root)
    _refuse_unexpected(root, _NAMES)
    caches = [root, *sorted((root / EXTENSIONS_FOLDER).glob("*/"))]
    holder = next(filter(None, map(live_lease, caches)), None)
    if holder is not None:
        raise UsageError(
            f"--overwrite: {root} is being written by {holder}; stop that job first (if it died"
            " with its machine, its lease expires three minutes later)"
        )
    with explained(root, "cannot remove"):
        (root / MANIFEST_FILE).unlink(missing_ok=True)
        for entry in sorted(root.iterdir(), key=lambda entry: entry.name == PLAN_FILE):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in COMPANIONS:
                entry.unlink(missing_ok=True)


def begin_form(location: Location, form: Form, *, advice: str = _FORM_ADVICE) -> None:
    """Write the form of a new cache, before its plan, or check the form of an existing one.

    Args:
        location: Location of the cache.
        form: Form of the cache.
        advice: What the user can do about another form, for the message.

    Raises:
        CacheMismatch: The cache was begun in another form.
    """
    storage = open_storage(location)
    if not storage.exists(PLAN_FILE):
        for relative, content in form.documents().items():
            storage.commit(relative, content, exclusive=True)
    check_form(storage, form, advice=advice)


def check_form(location: Location, form: Form, *, advice: str = _FORM_ADVICE) -> None:
    """Raise ``CacheMismatch`` if the cache was begun in another form; see :func:`begin_form`."""
    storage = open_storage(location)
    existing = read_form(storage)
    if existing != form:
        raise CacheMismatch(f"{storage.location} was begun in {existing}, not in {form}; {advice}")


def commit_plan(location: Location, plan: Plan) -> Plan:
    """Write the plan, unless another process has written one.

    Returns:
        The committed plan. If processes of one job begin a cache at the same time and compute
        different tables, all of them continue with the tables of the first.
    """
    storage = open_storage(location)
    if storage.commit(PLAN_FILE, canonical(plan), exclusive=True):
        return plan
    committed = read_plan(storage)
    if committed is None:
        raise EnvironmentFault(
            f"{storage.locate(PLAN_FILE)} exists but cannot be read: the file system may show files"
            " of other machines with a delay; run the same command again"
        )
    return committed


def begin_arrays(location: Location, plan: Plan, layout: Layout, num_passes: int) -> None:
    """Write the metadata of all arrays, and delete tables that the plan does not name."""
    storage = open_storage(location)
    if storage.root is not None:
        wanted = set(table_files(plan.identity))
        for path in (storage.root / TABLES_FOLDER).glob("*.safetensors"):
            if f"{TABLES_FOLDER}/{path.name}" not in wanted:
                path.unlink(missing_ok=True)  # of a run that was killed before it wrote a plan
    for unit in (SAMPLES, *range(num_passes)):
        commit_documents(storage, unit_documents(layout, unit))


def commit_documents(storage: Storage, documents: Mapping[str, bytes]) -> None:
    """Write small files, except those that exist with the same content."""
    made = storage.commit_all(documents, exclusive=True) if storage.is_remote else set()
    changed = {
        relative: content
        for relative, content in documents.items()
        if relative not in made and not holds(storage, relative, content)
    }
    if changed:
        storage.commit_all(changed)


def differences(committed: Identity, wanted: Identity) -> str:
    """Describe the fields in which two identities differ, with both values."""
    texts: list[str] = []

    def compare(name: str, old: Any, new: Any) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys()):
                compare(f"{name}.{key}" if name else key, old.get(key), new.get(key))
        elif old != new:
            texts.append(f"{name} is {_short(old)} in the cache, {_short(new)} here")

    compare("", committed.model_dump(mode="json"), wanted.model_dump(mode="json"))
    return "; ".join(texts[:4]) + ("; …" if len(texts) > 4 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
