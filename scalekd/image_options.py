"""How the samples of an image set are read, in whatever record has a ``--data-dir``."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ImageOptions(BaseModel):
    """How the samples of an image set are read; the command line takes its help from here."""

    model_config = ConfigDict(frozen=True)

    labels: Literal["auto", "none"] = Field(
        default="auto",
        description="Where labels come from: auto reads class folders, label members of shards or"
        " a label column; none ignores them and takes the images of a folder at any depth (of the"
        " training split: validation keeps its labels).",
    )
    input_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Extension of the images in shards, such as jpg or 'jpg;png', or column of the"
        " images in a table.  [default: whatever holds images]",
    )
    target_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Extension of the label member in shards (cls, txt), a field of the json"
        " member, or column of the labels in a table.  [default: cls; label]",
    )
    key_column: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Column of a table that names each sample, such as id or image/path, so that"
        " keys do not change with the files.  [default: file and row]",
    )

    @property
    def image_options(self) -> "ImageOptions":
        """These options alone, for :func:`scalekd.images.open_dataset`."""
        names = ImageOptions.model_fields
        return ImageOptions(**{name: getattr(self, name) for name in names})
