"""The two forms of a cache: Zarr arrays and tars, behind one interface."""

from typing import Literal

from scalekd.cache.forms.base import IMAGE, Embed, Form, PassReader, ShardFiles
from scalekd.cache.forms.tars import TarForm
from scalekd.cache.forms.webdataset.form import read_form_document
from scalekd.cache.forms.zarr import ZARR, ZarrArrays, ZarrForm
from scalekd.errors import UsageError
from scalekd.storage import Location

__all__ = [
    "IMAGE",
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
    if name == "zarr" and embed != "none":
        raise UsageError(f"--embed {embed}: only tars hold images; pass --format webdataset")
    return TarForm(embed) if name == "webdataset" else ZARR


def read_form(location: Location) -> Form:
    """The form of a cache that is there or begun.

    Raises:
        CacheCorrupt: Its form document is damaged.
        CacheMismatch: The document is of another version.
    """
    document = read_form_document(location)
    return ZARR if document is None else TarForm(document.embed)
