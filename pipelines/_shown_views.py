"""Choose views of a cache to show, and read their pixels, crops, features and answers."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from scalekd.cache import CacheReader, read_features, read_logits
from scalekd.cache.forms import IMAGE
from scalekd.cache.layout import DIFFERENCES
from scalekd.errors import DataError, UsageError
from scalekd.images.samples import ImageDataset, Sample
from scalekd.loading.views import ReplayContract, replay_view
from scalekd.text import printable
from scalekd.views import (
    Adjustment,
    CropBox,
    EraseBox,
    Mirror,
    Operation,
    ViewParams,
    decode_image,
    decode_view,
    pixel_hash,
    undo_differences,
    unpack_view,
)

Rows = np.ndarray[Any, Any]

_EMBEDDED = {"source": IMAGE, "view": IMAGE, "pixels": DIFFERENCES}
"""Array of the images that a cache embeds, by what it embeds."""

_STEP_NAMES = {Mirror: "mirrored", EraseBox: "a box erased", Adjustment: "colours changed"}


@dataclass
class ShownView:
    """One view, and the data that the cache stores about it.

    Attributes:
        row: Number of the sample in the cache.
        key: Key of the sample.
        label: Label, or -1.
        params: Stored parameters of the view.
        features: Decoded patch tokens by stage, ``(token, channel)``.
        logits: Decoded logits, ``(class,)``; ``None`` if the cache has none.
        pixels: Pixels of the view; ``None`` if neither image nor pixels are available.
        image: The whole image; ``None`` if it is not available.
        note: How the pixels differ from those the teacher saw; ``""`` if they are equal.
        live: The teacher's patch tokens by stage; empty without a teacher.
    """

    row: int
    key: str
    label: int
    params: ViewParams
    features: dict[int, Rows]
    logits: Rows | None
    pixels: Rows | None = None
    image: Image.Image | None = None
    note: str = ""
    live: dict[int, Rows] = field(default_factory=dict)


class ViewChooser:
    """Choice of the rows of a cache to show.

    Args:
        reader: The cache.
    """

    def __init__(self, reader: CacheReader) -> None:
        self._samples = reader.samples
        self._location = reader.location
        self._class_names = reader.identity.data.class_names

    def by_keys(self, keys: Sequence[str]) -> list[int]:
        """Return the rows of keys.

        Raises:
            DataError: The cache has no such sample.
        """
        row_of = {bytes(key): row for row, key in enumerate(self._samples.keys)}
        rows = []
        for key in keys:
            row = row_of.get(key.encode())
            if row is None:
                names = [raw.decode() for raw in list(row_of)[:10_000]]
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.4) or names[:1]
                raise DataError(
                    f"{self._location}: has no sample {printable(key, limit=120)!r};"
                    f" {printable(near[0], limit=120)!r} is one"
                )
            rows.append(row)
        return rows

    def drawn(self, count: int, class_name: str | None) -> list[int]:
        """Return the rows of a random sample, always the same, in order.

        Args:
            count: Number of rows.
            class_name: Name or number of the only class to take; all if ``None``.

        Raises:
            DataError: The cache has no such class.
        """
        rows = np.arange(len(self._samples))
        if class_name is not None:
            rows = np.flatnonzero(self._samples.labels == self._class_number(class_name))
            if not len(rows):
                raise DataError(f"{self._location}: no sample has the class {class_name!r}")
        chosen = np.random.default_rng(0).permutation(rows)[:count]
        return [int(row) for row in np.sort(chosen)]

    def _class_number(self, name: str) -> int:
        names = self._class_names or ()
        if name in names:
            return names.index(name)
        if name.isdecimal() and int(name) <= int(self._samples.labels.max(initial=-1)):
            return int(name)
        near = difflib.get_close_matches(name, names, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"it has {len(names):,} class names"
        raise DataError(f"{self._location}: has no class {printable(name, limit=120)!r}; {known}")


class ViewSource:
    """Reads chosen views of one pass of a cache.

    Args:
        reader: The cache.
        pass_index: Number of the pass.
        images: The images that the cache was made from; ``None`` if they are not available.
    """

    def __init__(self, reader: CacheReader, pass_index: int, images: ImageDataset | None) -> None:
        if pass_index not in reader.passes:
            raise UsageError(
                f"--pass {pass_index}: the cache has passes"
                f" {', '.join(map(str, reader.passes[:8]))} here"
            )
        self.reader, self.pass_index, self.images = reader, pass_index, images
        self._contract = ReplayContract.of(reader)

    @cached_property
    def _positions(self) -> Rows:
        if self.images is None:
            return np.full(len(self.reader.samples), -1)
        return self.images.positions(self.reader.samples.keys)

    def read(self, row: int) -> ShownView:
        """Read one view.

        Raises:
            CacheError: A file is damaged, or the image differs from the one that the teacher saw.
        """
        reader, identity = self.reader, self.reader.identity
        names = [array.name for array in reader.layout.views if array.name.startswith("view/")]
        names.append("pixel_hash")
        if (held := _EMBEDDED.get(reader.embed)) is not None:
            names.append(held)
        arrays = reader.read_rows(self.pass_index, row, 1, names)
        columns = {
            name.removeprefix("view/"): values
            for name, values in arrays.items()
            if name.startswith("view/")
        }
        rows = {"pass_index": self.pass_index, "first": row, "count": 1}
        features = {}
        for stage, codec in reader.codecs.stages.items():
            if reader.part.has_target(f"stage{stage}"):
                tokens = read_features(reader, stage=stage, **rows)[0]
                features[stage] = tokens[codec.shape.num_prefix_tokens :]
        has_logits = identity.logits is not None and reader.part.has_target("logits")
        view = ShownView(
            row=row,
            key=reader.samples.key(row),
            label=int(reader.samples.labels[row]),
            params=unpack_view(columns, 0, reader.policy),
            features=features,
            logits=read_logits(reader, **rows)[0] if has_logits else None,
        )
        self._add_pixels(view, arrays)
        return view

    def _add_pixels(self, view: ShownView, arrays: Mapping[str, Any]) -> None:
        """Redraw the view, or read it from the cache, and compare it with its hash."""
        reader, size = self.reader, self.reader.identity.views.view_size
        encoded = bytes(arrays[IMAGE][0]) if IMAGE in arrays else None
        if encoded is not None and reader.embed == "view":
            view.pixels = decode_view(encoded, key=view.key, view_size=size)
        if DIFFERENCES in arrays:
            stored = torch.from_numpy(np.ascontiguousarray(arrays[DIFFERENCES]))
            view.pixels = undo_differences(stored)[0].permute(1, 2, 0).numpy()
        if self.images is not None and (position := int(self._positions[view.row])) >= 0:
            encoded = self.images[position].image
        elif reader.embed != "source":
            encoded = None
        if encoded is not None:
            sample = Sample(view.key, encoded, view.label)
            self._contract.check_source(sample, int(reader.samples.source_hashes[view.row]))
            view.image = decode_image(encoded, key=view.key)
            if view.pixels is None:
                view.pixels = replay_view(sample, view.params, view_size=size)
        if view.pixels is None and self.pass_index == 0 and view.row < len(reader.witnesses):
            view.pixels = reader.witnesses[view.row]
        if view.pixels is not None and pixel_hash(view.pixels) != int(arrays["pixel_hash"][0]):
            view.note = "this machine redraws the view differently from what the teacher saw"


def crop_box(view: ShownView) -> tuple[float, float, float, float] | None:
    """Return left, top, width and height of the crop as fractions of the whole image."""
    if view.image is None or view.pixels is None:
        return None
    geometry, (width, height) = view.params.geometry, view.image.size
    if isinstance(geometry, CropBox):
        return (
            geometry.left / width,
            geometry.top / height,
            geometry.width / width,
            geometry.height / height,
        )
    rows, columns = view.pixels.shape[:2]
    scale = min(width / columns, height / rows) * geometry.fraction
    part = min(1.0, scale * columns / width), min(1.0, scale * rows / height)
    return (1 - part[0]) / 2, (1 - part[1]) / 2, *part


def steps_text(params: ViewParams) -> str:
    """Name the steps of a view after its crop, in their order."""
    names = []
    for step in params.steps:
        if isinstance(step, Operation):
            argument = f" {step.argument:.3g}" if step.argument else ""
            names.append(step.name.replace("_", " ") + argument)
        else:
            names.append(_STEP_NAMES.get(type(step), type(step).__name__))
    return ", ".join(names)
