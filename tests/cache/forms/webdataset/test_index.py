"""An index of another tar, or with offsets outside the tar, is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scalekd.cache.forms.webdataset.index import ShardIndex
from scalekd.errors import CacheCorrupt

SHARD = "passes/0001/000002"


def read(data: bytes, **changes: int) -> ShardIndex:
    settings = {"num_rows": 22, "block_size": 8, "tar_bytes": 1 << 20, **changes}
    return ShardIndex.from_bytes(data, "index", **settings)


@pytest.fixture(scope="module")
def content(sound_tars: Path) -> bytes:
    return (sound_tars / f"{SHARD}.index.safetensors").read_bytes()


def test_every_member_is_where_the_index_says(
    content: bytes, sound_tars: Path, image_bytes: dict[int, bytes]
) -> None:
    tar = (sound_tars / f"{SHARD}.tar").read_bytes()
    index = read(content, tar_bytes=len(tar))
    for row, (image, image_size, packed, packed_size) in enumerate(index.views.tolist()):
        assert tar[image : image + image_size] == image_bytes[48 + row]
        assert tar[packed : packed + 4] == b"SKDV"
        assert tar[packed + packed_size : packed + packed_size + 100].strip(b"\0")[:1] in b"s"
    assert int(index.blocks.sum(axis=1)[-1]) == len(tar) - 1024


@pytest.mark.parametrize("changes", [{"num_rows": 21}, {"num_rows": 24}, {"block_size": 4}])
def test_an_index_of_another_shard_is_refused(content: bytes, changes: dict[str, int]) -> None:
    with pytest.raises(CacheCorrupt, match="not an index of"):
        read(content, **changes)


def test_bytes_that_are_no_index_are_refused() -> None:
    for data in (b"", b"{}", b"\xff" * 64):
        with pytest.raises(CacheCorrupt, match="not a safetensors file"):
            read(data)


def edited(name: str, place: tuple[int, int], value: int) -> Callable[[ShardIndex], ShardIndex]:
    def change(index: ShardIndex) -> ShardIndex:
        rows = getattr(index, name).copy()
        rows[place] = value
        return dataclasses.replace(index, **{name: rows})

    return change


@pytest.mark.parametrize(
    "change",
    [
        edited("blocks", (0, 0), 512),
        edited("blocks", (1, 0), 0),
        edited("blocks", (2, 1), 1 << 40),
        edited("blocks", (0, 1), 2**63 - 1),
        edited("blocks", (1, 1), -1),
        edited("views", (3, 2), 1 << 40),
        edited("views", (3, 2), -1),
        edited("views", (9, 3), 1 << 40),
        edited("views", (9, 3), 0),
        edited("views", (20, 0), 512),
        edited("views", (2, 1), 2**63 - 1),
    ],
)
def test_members_outside_their_block_are_refused(
    content: bytes, change: Callable[[ShardIndex], ShardIndex]
) -> None:
    with pytest.raises(CacheCorrupt, match="block"):
        read(change(read(content)).to_bytes())


def test_a_tar_shorter_than_its_blocks_is_refused(content: bytes) -> None:
    index = read(content)
    end = int(index.blocks[-1].sum())
    assert np.array_equal(read(content, tar_bytes=end).views, index.views)
    with pytest.raises(CacheCorrupt, match="inside the tar"):
        read(content, tar_bytes=end - 1)
