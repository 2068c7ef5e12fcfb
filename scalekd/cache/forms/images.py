"""``images.json``: that a cache in Zarr form embeds the pixels of its views.

A cache without the document embeds no images. Like ``webdataset.json`` it is written before the
plan and never changes, so that every process and every reader knows the arrays of a pass.
"""

from typing import Literal

from scalekd.cache.documents import CacheDocument, canonical

IMAGES_FILE = "images.json"


class ImagesForm(CacheDocument):
    """Content of ``images.json``.

    Attributes:
        embed: Kind of images that the cache embeds.
    """

    format: Literal["scalekd-images"] = "scalekd-images"
    format_version: Literal[1] = 1
    embed: Literal["pixels"] = "pixels"


def images_documents() -> dict[str, bytes]:
    """Return the document of a cache that embeds pixels, by path."""
    return {IMAGES_FILE: canonical(ImagesForm())}
