"""Folders, object stores and web servers behind one interface, :class:`Storage`."""

import re
from pathlib import Path

from scalekd.storage.base import Listing, NotStored, Storage, StoredFile, StoredFileError
from scalekd.storage.hub import HubStorage
from scalekd.storage.linked import LinkedStorage
from scalekd.storage.local import LocalStorage
from scalekd.storage.local_cache import LocalCache, make_local_cache
from scalekd.storage.objects import ObjectStorage

__all__ = [
    "HubStorage",
    "LinkedStorage",
    "Listing",
    "LocalCache",
    "LocalStorage",
    "Location",
    "NotStored",
    "Storage",
    "StoredFile",
    "StoredFileError",
    "is_remote",
    "make_local_cache",
    "open_storage",
]

Location = str | Path | Storage
"""A folder, a URL, or a :class:`Storage` that was opened from either."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_remote(location: Location) -> bool:
    """Return whether ``location`` is remote: a URL other than ``file://``, or a remote storage."""
    if isinstance(location, Storage):
        return location.is_remote
    url = _URL.match(str(location)) if isinstance(location, str) else None
    return url is not None and url[1] != "file"


def open_storage(location: Location, *, local_cache: LocalCache | None = None) -> Storage:
    """Open the storage at a location. Nothing is read yet.

    Args:
        location: A folder, or a URL with ``file://``, ``s3://``, ``gs://``, ``az://``,
            ``https://`` or ``hf://``; a storage is returned unchanged.
        local_cache: Local cache that keeps copies of the files read from a remote location.

    Raises:
        UsageError: The URL is of an unknown kind, or its package is not installed.
    """
    if local_cache is not None:
        return local_cache.over(open_storage(location))
    if isinstance(location, Storage):
        return location
    if isinstance(location, Path):
        return LocalStorage(location)
    url = _URL.match(location)
    if url is None:
        return LocalStorage(location)
    if url[1] == "file":
        return LocalStorage(location.removeprefix("file://"))
    if url[1] == "hf":
        return HubStorage(location)
    return ObjectStorage(location)
