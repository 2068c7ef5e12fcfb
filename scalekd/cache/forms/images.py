"""``images.json``: what a cache in Zarr form contains of its images.

A cache without the document contains no images. Like ``webdataset.json`` it is written before the
plan and never changes, so that every process and every reader knows the arrays of a pass.
"""

from typing import Literal

from scalekd.cache.documents import CacheDocument, canonical
from scalekd.cache.documents.stored import read_document_if_any
from scalekd.storage import Location, open_storage

IMAGES_FILE = "images.json"
_MAX_BYTES = 64 << 10


class ImagesForm(CacheDocument):
    """Content of ``images.json``.

    Attributes:
        embed: What the cache contains of its images.
    """

    format: Literal["scalekd-images"] = "scalekd-images"
    format_version: Literal[1] = 1
    embed: Literal["pixels"] = "pixels"


def images_documents() -> dict[str, bytes]:
    """Return the document of a cache that embeds pixels, by path."""
    return {IMAGES_FILE: canonical(ImagesForm())}


def read_images_document(location: Location) -> ImagesForm | None:
    """Read the document of a cache; ``None`` for a cache without images.

    Raises:
        CacheCorrupt: It is damaged.
    """
    return read_document_if_any(
        open_storage(location),
        IMAGES_FILE,
        ImagesForm,
        "the form of the cache",
        max_bytes=_MAX_BYTES,
    )
