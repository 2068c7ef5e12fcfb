"""Base of the records of options, and the options of every command that reads an image set."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field

Embed = Literal["none", "source", "view", "pixels"]
"""Images in a cache: none, the encoded files as they are, or the rendered views, either as lossless
images or as differences between neighbouring pixels."""
Workers = Annotated[int, Field(ge=0, le=1024)]
"""Number of worker processes of one process; a mistyped one would fill the machine's memory."""
StoredBytes = Annotated[ByteSize, Field(gt=0, lt=1 << 60)]
DEFAULT_FEATURE_CODEC = "transform"
MAX_SIDE = 4096
"""Largest height or width of a model's images in pixels."""


def image_size(value: object) -> object:
    """Read ``224``, ``"192,320"``, ``"192x320"`` or a pair: a square, or height and width.

    Raises:
        ValueError: It is neither, or a side is outside 1..4096.
    """
    sides: list[object]
    if isinstance(value, str):
        parts = re.split("[,x]", value)
        sides = [int(part) if part.strip().isdecimal() else part for part in parts]
    else:
        sides = list(value) if isinstance(value, list | tuple) else [value]
    sound = all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)
    if len(sides) not in (1, 2) or not sound:
        raise ValueError(f"an image size is S or H,W, each side in 1..{MAX_SIDE} pixels")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


ImageSize = Annotated[int | tuple[int, int], BeforeValidator(image_size)]
"""Image size in pixels: one number for a square, or height and width."""


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of an :data:`ImageSize`."""
    return (size, size) if isinstance(size, int) else size


class Options(BaseModel):
    """Options of a command: the docstring below a field is the help of its option."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ImageOptions(Options):
    """How the samples of an image set are read."""

    labels: Literal["auto", "none"] = "auto"
    """Source of the labels: auto for class folders, label members of shards or a label column; none
    to ignore labels and take the images of a folder at any depth. Validation images keep their
    labels."""
    input_key: str | None = Field(default=None, min_length=1, max_length=200)
    """Extension of the images in shards, such as jpg or 'jpg;png', or column of the images in a
    table; if not given, any that contains images."""
    target_key: str | None = Field(default=None, min_length=1, max_length=200)
    """Extension of the label member in shards (cls, txt), field of the json member, or column of
    the labels in a table; if not given, whole numbers in cls, json or txt, or the column label."""
    key_column: str | None = Field(default=None, min_length=1, max_length=200)
    """Column of a table that names each sample, such as id or image/path, so that keys do not
    change with the files; if not given, keys are made of file and row."""

    @property
    def image_options(self) -> "ImageOptions":
        """These options alone, for :func:`scalekd.images.open_dataset`."""
        names = ImageOptions.model_fields
        return ImageOptions(**{name: getattr(self, name) for name in names})
