"""Caches that were written in format 1 still open, and have the same content."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalekd.cache import CacheReader, TargetDecoder, open_cache
from scalekd.cache.care.verify import verify
from scalekd.distillation import FullLogits, TopKLogits
from scalekd.images import open_dataset
from scalekd.loading.views import replay_view
from scalekd.pipelines.inspect_cache import cache_info
from scalekd.teachers import load_tail
from scalekd.views import (
    EraseBox,
    Middle,
    Mirror,
    Operation,
    ViewParams,
    pixel_hash,
    unpack_view,
)

FOLDER = Path(__file__).parent / "frozen" / "format1"
IMAGES = FOLDER / "images"

pytestmark = pytest.mark.parametrize("name", ["float16", "int8", "transform"])


def expected(root: Path) -> dict[str, Any]:
    """What a reader must find, in JSON."""
    reader = open_cache(root)
    samples, names = reader.samples, [array.name for array in reader.layout.views]
    passes = []
    for index in range(reader.num_passes):
        blocks = [reader.read_rows(index, *block, names) for block in reader.blocks()]
        whole = {name: np.concatenate([block[name] for block in blocks]) for name in names}
        columns = {
            name.removeprefix("view/"): rows
            for name, rows in whole.items()
            if name.startswith("view/")
        }
        views = [unpack_view(columns, row, reader.policy) for row in range(len(samples))]
        passes.append(
            {
                "arrays": {name: hash_of(rows) for name, rows in whole.items()},
                "views": [in_words(view) for view in views],
                "pixel_hashes": [f"{value:016x}" for value in whole["pixel_hash"].tolist()],
            }
        )
    return {
        "cache_id": reader.manifest.plan.cache_id,
        "manifest_digest": reader.manifest.digest,
        "keys": [samples.key(sample) for sample in range(len(samples))],
        "labels": samples.labels.tolist(),
        "source_hashes": [f"{value:016x}" for value in samples.source_hashes.tolist()],
        "witnesses": hash_of(reader.witnesses),
        "passes": passes,
    }


def in_words(view: ViewParams) -> str:
    """Write a view as it was written when the caches were frozen."""
    box, middle = view.geometry, None
    if isinstance(view.geometry, Middle):
        box, middle = None, view.geometry.fraction
    (erased,) = view.of(EraseBox) or (None,)
    erase = erased and "EraseBox(top={}, left={}, height={}, width={})".format(*erased[:4])
    return (
        f"ViewParams(crop={box}, center={middle}, flip={bool(view.of(Mirror))},"
        f" operations={view.of(Operation)}, erase={erase},"
        f" noise_seed={erased.noise_seed if erased else 0},"
        f" interpolation={view.interpolation!r}, mean={view.mean}, std={view.std})"
    )


def hash_of(rows: np.ndarray) -> str:
    """SHA-256 of type, shape and little-endian bytes."""
    little = rows.astype(rows.dtype.newbyteorder("<"), copy=False)
    head = f"{little.dtype.str} {little.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(little).tobytes()).hexdigest()


def decoded(root: Path) -> np.ndarray:
    """Final-stage features of pass 0, float32."""
    reader = open_cache(root)
    codec = reader.codecs.stages[4]
    names = [f"stage4/{plane.name}" for plane in codec.planes]
    parts = []
    for block in reader.blocks():
        rows = reader.read_rows(0, *block, names)
        planes = {
            plane.name: np.moveaxis(rows[f"stage4/{plane.name}"], 0, plane.view_axis)
            for plane in codec.planes
        }
        parts.append(codec.decode(planes))
    return np.concatenate(parts)


@pytest.fixture
def frozen(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


@pytest.fixture
def reader(name: str) -> CacheReader:
    return open_cache(FOLDER / name)


def test_a_frozen_cache_is_intact(name: str) -> None:
    found = verify(FOLDER / name)
    assert found.problems == []
    assert found.num_files > 30


def test_info_describes_a_frozen_cache(name: str, frozen: dict[str, Any]) -> None:
    info = cache_info(FOLDER / name)
    assert (info.num_samples, info.num_skipped, info.format_version) == (7, 1, 1)
    assert info.num_passes == len(frozen["passes"])
    assert info.skipped == ("class-1/image-1.png",)
    assert info.cache_id == frozen["cache_id"]


def test_stored_values_equal_the_frozen_ones(name: str, frozen: dict[str, Any]) -> None:
    """Every stored value of every array, by hash, and the views in words."""
    assert expected(FOLDER / name) == frozen


def test_views_are_redrawn_to_the_pixels_the_teacher_saw(
    reader: CacheReader, frozen: dict[str, Any]
) -> None:
    """From PNG, whose decoding is exact; the operations are Pillow's and NumPy's."""
    images = open_dataset(str(IMAGES), "train")
    samples = {sample.key: sample for sample in (images[i] for i in range(len(images)))}
    size, columns = reader.identity.views.view_size, [a.name for a in reader.layout.views]
    seen = []
    for index in range(reader.num_passes):
        for first, count in reader.blocks():
            rows = reader.read_rows(index, first, count, columns)
            stored = {column.removeprefix("view/"): found for column, found in rows.items()}
            for row in range(count):
                sample = samples[reader.samples.key(first + row)]
                view = unpack_view(stored, row, reader.policy)
                pixels = replay_view(sample, view, view_size=size)
                seen.append(f"{pixel_hash(pixels):016x}")
                if index == 0 and first + row < len(reader.witnesses):
                    np.testing.assert_array_equal(pixels, reader.witnesses[first + row])
    assert seen == [found for each in frozen["passes"] for found in each["pixel_hashes"]]


def test_features_decode_to_the_frozen_values(name: str) -> None:
    with np.load(FOLDER / "features.npz", allow_pickle=False) as frozen:
        # Matrix products may differ in their last bits between machines.
        np.testing.assert_allclose(decoded(FOLDER / name), frozen[name], rtol=1e-4, atol=1e-4)


def test_the_decoder_for_training_gives_targets(name: str, reader: CacheReader) -> None:
    with_logits = reader.codecs.logits is not None
    decoder = TargetDecoder(reader.codecs, features=True, logits=with_logits)
    first, count = reader.blocks()[0]
    names = [a.name for a in reader.layout.views if a.name.split("/")[0] in decoder.groups]
    rows = reader.read_rows(0, first, count, names)
    targets = decoder({k.replace("/", "."): torch.from_numpy(v) for k, v in rows.items()})
    assert targets.features is not None
    assert targets.features.shape == (2, 16, 16)
    kind = {"float16": TopKLogits, "transform": FullLogits}.get(name, type(None))
    assert isinstance(targets.logits, kind)


def test_the_tail_takes_the_stored_stage_to_the_stored_final_one(
    name: str, reader: CacheReader, tmp_path: Path
) -> None:
    identity = reader.identity
    path = tmp_path / "tail"
    path.write_bytes(reader.file(identity.tail, identity.tail_digest))
    tail = load_tail(path)
    assert tail.stages[4] == identity.stages["4"].shape
    if name != "float16":
        return
    rows = reader.read_rows(1, 0, 2, ["stage3/values", "stage4/values"])
    before, after = (torch.from_numpy(rows[f"stage{s}/values"].astype(np.float32)) for s in (3, 4))
    found = tail(before[:, 1:], before[:, :1])
    torch.testing.assert_close(found, after[:, 1:], rtol=0, atol=5e-3)  # float16 going in
