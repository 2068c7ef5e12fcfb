"""The two forms of a cache: Zarr arrays and tars, behind one interface."""

from typing import Literal

from scalekd.cache.forms.base import (
    HAS_IMAGES,
    IMAGE,
    RENDERED,
    Form,
    PassReader,
    ShardFiles,
)
from scalekd.cache.forms.images import read_images_document
from scalekd.cache.forms.tars import TarForm
from scalekd.cache.forms.webdataset.form import read_form_document
from scalekd.cache.forms.zarr import ZARR, ZARR_PIXELS, ZarrArrays, ZarrForm
from scalekd.errors import UsageError
from scalekd.options import Embed
from scalekd.storage import Location

__all__ = [
    "HAS_IMAGES",
    "IMAGE",
    "RENDERED",
    "ZARR",
    "Embed",
    "Form",
    "PassReader",
    "ShardFiles",
    "TarForm",
    "ZarrArrays",
    "ZarrForm",
    "form_named",
    "read_form",
]


def form_named(name: Literal["zarr", "webdataset"], embed: Embed) -> Form:
    """Return the form that ``--format`` and ``--embed`` ask for.

    Raises:
        UsageError: The form cannot contain images.
    """
    if name == "webdataset":
        return TarForm(embed)
    if embed in HAS_IMAGES:
        raise UsageError(
            f"--embed {embed}: only tars hold encoded images; pass --format webdataset, or --embed"
            " pixels"
        )
    return ZARR if embed == "none" else ZARR_PIXELS


def read_form(location: Location) -> Form:
    """The form of a cache that is there or begun.

    Raises:
        CacheCorrupt: Its form document is damaged.
        CacheMismatch: The document is of another version.
    """
    document = read_form_document(location)
    if document is not None:
        return TarForm(document.embed)
    return ZARR if read_images_document(location) is None else ZARR_PIXELS
