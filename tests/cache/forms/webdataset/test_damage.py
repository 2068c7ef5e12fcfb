"""Damage to tars, indexes and documents is found by verification and by reading."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.forms import IMAGE
from scalekd.cache.layout import ShardId
from scalekd.errors import CacheCorrupt, CacheError, CacheMismatch

TAR, INDEX = "passes/0001/000001.tar", "passes/0001/000001.index.safetensors"


@pytest.fixture
def tars(sound_tars: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_tars, tmp_path / "cache"))


def read_all(root: Path) -> None:
    reader = open_cache(root)
    names = [*(array.name for array in reader.layout.views), IMAGE]
    for pass_index in range(reader.num_passes):
        for block in reader.blocks():
            reader.read_rows(pass_index, *block, names)


def middle_flipped(content: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize("path", [TAR, INDEX])
@pytest.mark.parametrize(
    "harm",
    [
        middle_flipped,
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: None,
    ],
)
def test_every_damage_to_a_tar_or_index_is_reported(
    tars: Path, path: str, harm: Callable[[bytes], bytes | None]
) -> None:
    content = harm((tars / path).read_bytes())
    (tars / path).unlink()
    if content is not None:
        (tars / path).write_bytes(content)
    with pytest.raises(CacheCorrupt, match=path):
        read_all(tars)
    found = verify(tars)
    assert found.damaged == {ShardId(1, 1)}
    assert path in found.problems[0]


def test_only_the_damaged_block_is_lost(tars: Path) -> None:
    content = bytearray((tars / TAR).read_bytes())
    content[600] ^= 1  # in the first image of the shard's first block
    (tars / TAR).write_bytes(content)
    reader = open_cache(tars)
    with pytest.raises(CacheCorrupt, match="from byte 0 on: its bytes changed"):
        reader.read_rows(1, 24, 8, ["pixel_hash"])
    assert len(reader.read_rows(1, 32, 8, ["pixel_hash"])["pixel_hash"]) == 8


def test_swapped_shards_and_passes_are_reported(tars: Path) -> None:
    for other in ("passes/0001/000000.tar", "passes/0000/000001.tar"):
        first, second = (tars / TAR).read_bytes(), (tars / other).read_bytes()
        (tars / TAR).write_bytes(second)
        (tars / other).write_bytes(first)
        with pytest.raises(CacheCorrupt):
            read_all(tars)
        assert len(verify(tars).damaged) == 2
        (tars / TAR).write_bytes(first)
        (tars / other).write_bytes(second)
    assert not verify(tars).problems


def test_a_link_instead_of_a_tar_is_refused(tars: Path, tmp_path: Path) -> None:
    (tars / TAR).rename(tmp_path / "elsewhere.tar")
    (tars / TAR).symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(CacheCorrupt, match="symbolic link"):
        read_all(tars)
    assert verify(tars).problems


@pytest.mark.parametrize("name", ["webdataset.json", "_info.json", "passes/fields.json"])
def test_edited_documents_are_refused(tars: Path, name: str) -> None:
    path = tars / name
    path.write_bytes(path.read_bytes().replace(b'"s', b'"t', 1))
    try:
        problems = verify(tars).problems
    except CacheError as error:
        problems = [str(error)]
    assert name in problems[0]


def test_another_version_or_a_missing_form_document_is_refused(tars: Path) -> None:
    path = tars / "webdataset.json"
    content = path.read_text()
    path.write_text(content.replace('"format_version": 1', '"format_version": 3'))
    with pytest.raises(CacheMismatch, match=r"form 3.*reads up to version 2"):
        open_cache(tars)
    path.write_text(content.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CacheCorrupt, match="version 2 is for pixels"):
        open_cache(tars)
    path.unlink()
    with pytest.raises(CacheCorrupt, match="names other files"):
        read_all(tars)


def test_rows_are_read_from_parts_of_blocks_and_across_blocks(
    tars: Path, sound_cache: Path
) -> None:
    reader, zarr = open_cache(tars), open_cache(sound_cache)
    names = ["stage4/values", "view/crop", "pixel_hash"]
    for first, count in [(0, 1), (3, 4), (5, 9), (24, 24), (47, 1), (48, 22), (69, 1)]:
        here, there = (cache.read_rows(1, first, count, names) for cache in (reader, zarr))
        for name in names:
            np.testing.assert_array_equal(here[name], there[name])
    with pytest.raises(CacheMismatch, match="pass 2"):
        reader.read_rows(2, 0, 1, names)
