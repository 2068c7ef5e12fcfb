"""The documents and paths of the WebDataset form.

``webdataset.json`` is written before the plan and never changes, so that every process and every
reader knows the form before it opens a shard.
"""

import json
from typing import Any, Literal, Self

from pydantic import model_validator

from scalekd.cache.documents import CacheDocument
from scalekd.options import Embed

FORM_FILE = "webdataset.json"
INFO_FILE = "_info.json"
"""Document for timm's reader of WebDataset shards: names and lengths of a split's shards."""
FIELDS_FILE = "passes/fields.json"
PACKED_EXTENSION = "skd"


class WebDatasetForm(CacheDocument):
    """Content of ``webdataset.json``.

    Attributes:
        format_version: 2 for ``pixels``, which version 1 does not have.
        embed: Kind of images that the tars contain.
    """

    format: Literal["scalekd-webdataset"] = "scalekd-webdataset"
    format_version: Literal[1, 2] = 1
    embed: Embed

    @classmethod
    def of(cls, embed: Embed) -> Self:
        """Return the document of a cache with images of this kind."""
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


def tar_path(pass_index: int, shard: int) -> str:
    """Return the path of a shard's tar."""
    return f"passes/{pass_index:04d}/{shard:06d}.tar"


def index_path(pass_index: int, shard: int) -> str:
    """Return the path of the index of a shard's tar."""
    return f"passes/{pass_index:04d}/{shard:06d}.index.safetensors"


def info_document(lengths: dict[int, int]) -> bytes:
    """Return ``_info.json`` for timm: the split ``train`` is pass 0, one view of every sample.

    Args:
        lengths: Number of views of each shard; a shard without views has no tar.
    """
    kept = {shard: length for shard, length in sorted(lengths.items()) if length}
    split: dict[str, Any] = {
        "name": "train",
        "filenames": [tar_path(0, shard) for shard in kept],
        "shard_lengths": list(kept.values()),
        "num_samples": sum(kept.values()),
    }
    return json.dumps({"splits": {"train": split}}, sort_keys=True, indent=2).encode() + b"\n"
