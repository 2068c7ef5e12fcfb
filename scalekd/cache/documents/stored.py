"""Read JSON documents of a cache from its storage, checking size and content."""

from scalekd.cache.documents import MAX_JSON_BYTES, Model, parse_committed
from scalekd.cache.files import read_bounded
from scalekd.errors import CacheCorrupt
from scalekd.storage import NotStored, Storage, StoredFileError


def read_document_if_any(
    storage: Storage,
    relative: str,
    model: type[Model],
    what: str,
    *,
    max_bytes: int = MAX_JSON_BYTES,
) -> Model | None:
    """Read a document, or return ``None`` if it does not exist; see :func:`read_document`."""
    where = storage.locate(relative)
    try:
        data = storage.read(relative, max_bytes=max_bytes)
    except NotStored:
        return None
    except StoredFileError as error:
        raise CacheCorrupt(f"{where}: {what} {error.problem}") from None
    return parse_committed(model, data, where=where)


def read_document(
    storage: Storage,
    relative: str,
    model: type[Model],
    what: str,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    sha256: str | None = None,
) -> Model:
    """Read a document.

    Args:
        storage: Storage of the cache.
        relative: Path inside the cache.
        model: Kind of document.
        what: Name of the document, for messages.
        max_bytes: Largest size accepted.
        sha256: SHA-256 of the file if known; it helps a local cache, and is not checked.

    Raises:
        CacheCorrupt: The document is missing, too large, damaged or edited.
        CacheMismatch: Another version of the format wrote it.
    """
    data = read_bounded(storage, relative, max_bytes=max_bytes, what=what, sha256=sha256)
    return parse_committed(model, data, where=storage.locate(relative))
