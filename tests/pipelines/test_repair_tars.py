"""Tars come back to the byte like anything else of a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.errors import CacheCorrupt
from scalekd.pipelines._source_options import RepairConfig
from scalekd.pipelines.repair_cache import repair_cache

_DAMAGED = [
    "passes/0001/000002.tar",
    "passes/0000/000000.index.safetensors",
    "webdataset.json",
    "_info.json",
    "passes/fields.json",
    "records/0001/000001.json",
    "manifest.json",
    "samples/key/c/1/0",
]


def test_all_damaged_files_are_repaired_to_the_same_bytes(
    make_cache: Callable[..., Any],
    tiny_images: Path,
    tmp_path: Path,
    file_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    root = tmp_path / "cache"
    make_cache(root, format="webdataset", embed="view")
    sound = file_contents(root)
    config = RepairConfig(cache=root, data_dir=str(tiny_images), workers=0)
    for number, path in enumerate(_DAMAGED):
        if number % 2:
            (root / path).unlink()
        else:
            (root / path).write_bytes((root / path).read_bytes()[:-2] + b"xx")
        found = repair_cache(config)
        assert found.sound, found.problems
        assert found.mended == (path,)
        assert file_contents(root) == sound
    (root / "webdataset.json").unlink()
    (root / "manifest.json").unlink()
    with pytest.raises(CacheCorrupt, match="it is not known which images the tars embed"):
        repair_cache(config)


def test_embedded_pixels_are_repaired_in_both_forms(
    make_cache: Callable[..., Any],
    tiny_images: Path,
    tmp_path: Path,
    file_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    chunk = "passes/0001/pixels/differences/c/2/0/0/0"
    for form, damaged in (
        ("zarr", [chunk, "images.json", "passes/0000/pixels/differences/zarr.json"]),
        ("webdataset", ["passes/0001/000001.tar", "webdataset.json"]),
    ):
        root = tmp_path / form
        make_cache(root, format=form, embed="pixels")
        sound = file_contents(root)
        config = RepairConfig(cache=root, data_dir=str(tiny_images), workers=0)
        for number, path in enumerate(damaged * 2):
            if number >= len(damaged):
                (root / path).unlink()
            else:
                (root / path).write_bytes((root / path).read_bytes()[:-2] + b"xx")
            repaired = repair_cache(config)
            assert repaired.sound, repaired.problems
            assert repaired.mended == (path,)
            assert file_contents(root) == sound
    root = tmp_path / "zarr"
    sound = file_contents(root)
    for path in ("images.json", "manifest.json"):
        (root / path).unlink()
    repaired = repair_cache(RepairConfig(cache=root, data_dir=str(tiny_images), workers=0))
    assert set(repaired.mended) == {"images.json", "manifest.json"}
    assert file_contents(root) == sound
