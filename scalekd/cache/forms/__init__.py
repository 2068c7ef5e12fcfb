"""The two forms of a cache: Zarr arrays and tars, behind one interface."""

from typing import Literal

from scalekd.cache.documents.stored import read_document_if_any
from scalekd.cache.forms.base import (
    HAS_IMAGES,
    IMAGE,
    RENDERED,
    Form,
    PassReader,
    ShardFiles,
)
from scalekd.cache.forms.images import IMAGES_FILE, ImagesForm
from scalekd.cache.forms.tars import TarForm
from scalekd.cache.forms.webdataset.form import FORM_FILE, WebDatasetForm
from scalekd.cache.forms.zarr import ZARR, ZARR_PIXELS, ZarrArrays, ZarrForm
from scalekd.errors import UsageError
from scalekd.options import Embed
from scalekd.storage import Location, open_storage

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

_MAX_DOCUMENT_BYTES = 64 << 10
_WHAT = "the form of the cache"


def form_named(name: Literal["zarr", "webdataset"], embed: Embed) -> Form:
    """Return the form that ``--format`` and ``--embed`` specify.

    Raises:
        UsageError: The form cannot embed encoded images.
    """
    if name == "webdataset":
        return TarForm(embed)
    if embed in HAS_IMAGES:
        raise UsageError(
            f"--embed {embed}: only tars contain encoded images; pass --format webdataset, or"
            " --embed pixels"
        )
    return ZARR if embed == "none" else ZARR_PIXELS


def read_form(location: Location) -> Form:
    """Read the form of a cache; the Zarr form without images has no document.

    Raises:
        CacheCorrupt: The document of the form is damaged.
        CacheMismatch: Another version of the format wrote the document.
    """
    storage = open_storage(location)
    tars = read_document_if_any(
        storage, FORM_FILE, WebDatasetForm, _WHAT, max_bytes=_MAX_DOCUMENT_BYTES
    )
    if tars is not None:
        return TarForm(tars.embed)
    images = read_document_if_any(
        storage, IMAGES_FILE, ImagesForm, _WHAT, max_bytes=_MAX_DOCUMENT_BYTES
    )
    return ZARR if images is None else ZARR_PIXELS
