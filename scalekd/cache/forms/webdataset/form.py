"""``webdataset.json``: that a cache has the WebDataset form, and what its tars hold.

It is written before the plan and never changes, so that every process that joins a job, and
every reader, knows the form before it looks at a shard.
"""

import json
from typing import Any, Literal, Self

from pydantic import model_validator

from scalekd.cache.documents import CacheDocument, canonical
from scalekd.cache.documents.stored import read_document_if_any
from scalekd.options import Embed
from scalekd.storage import Location, open_storage

FORM_FILE = "webdataset.json"
INFO_FILE = "_info.json"
"""What timm's reader of WebDataset shards looks for: names and lengths of a split's shards."""
FIELDS_FILE = "passes/fields.json"
PACKED_EXTENSION = "skd"
_MAX_FORM_BYTES = 64 << 10


class WebDatasetForm(CacheDocument):
    """Content of ``webdataset.json``.

    Attributes:
        format_version: 2 for ``pixels``, which readers of version 1 do not know.
        embed: Which images the tars contain.
    """

    format: Literal["scalekd-webdataset"] = "scalekd-webdataset"
    format_version: Literal[1, 2] = 1
    embed: Embed

    @classmethod
    def of(cls, embed: Embed) -> Self:
        """Return the document of a cache with these images."""
        return cls(format_version=2 if embed == "pixels" else 1, embed=embed)

    @model_validator(mode="after")
    def _check_embed(self) -> Self:
        if (self.embed == "pixels") != (self.format_version == 2):
            raise ValueError(
                f"format_version {self.format_version} with embed {self.embed}; version 2 is for"
                " pixels"
            )
        return self


class PackedField(CacheDocument):
    """One array of a packed view.

    Attributes:
        name: Name of the array in the Zarr form, such as ``stage4/coefficients``.
        dtype: NumPy name of the element type; values are stored little-endian.
        shape: Shape for one view.
        coding: ``raw`` for uncompressed values. Other fields are compressed if that is smaller.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: Literal["raw", "pcodec", "zstd"]


class PackedFields(CacheDocument):
    """Content of ``passes/fields.json``, which replaces the array metadata of the Zarr form.

    Attributes:
        fields: Arrays of a packed view, in the order in which they are stored.
    """

    fields: tuple[PackedField, ...]


def fields_document(fields: tuple[PackedField, ...]) -> bytes:
    return canonical(PackedFields(fields=fields))


def read_form_document(location: Location) -> WebDatasetForm | None:
    """The form document of a cache; ``None`` for a cache in Zarr form.

    Raises:
        CacheCorrupt: It is damaged.
        CacheMismatch: It is of another version.
    """
    return read_document_if_any(
        open_storage(location),
        FORM_FILE,
        WebDatasetForm,
        "the form of the cache",
        max_bytes=_MAX_FORM_BYTES,
    )


def tar_path(pass_index: int, shard: int) -> str:
    return f"passes/{pass_index:04d}/{shard:06d}.tar"


def index_path(pass_index: int, shard: int) -> str:
    return f"passes/{pass_index:04d}/{shard:06d}.index.safetensors"


def info_document(lengths: dict[int, int]) -> bytes:
    """``_info.json`` for timm: the split ``train`` is pass 0, one view of every sample.

    Args:
        lengths: Views by number of the shard. A shard without views has no tar.
    """
    kept = {shard: length for shard, length in sorted(lengths.items()) if length}
    split: dict[str, Any] = {
        "name": "train",
        "filenames": [tar_path(0, shard) for shard in kept],
        "shard_lengths": list(kept.values()),
        "num_samples": sum(kept.values()),
    }
    return json.dumps({"splits": {"train": split}}, sort_keys=True, indent=2).encode() + b"\n"
