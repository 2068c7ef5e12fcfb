"""Committed files are compared with their digests, whatever is at their paths."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd.cache.files import FileDigest, digest, digest_on_disk, read_bounded, read_checked
from scalekd.errors import CacheCorrupt
from scalekd.storage import LocalStorage


def test_symbolic_links_are_refused_at_every_level(tmp_path: Path) -> None:
    root, other = tmp_path / "cache", tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"secret")
    (root / "plain").mkdir(parents=True)
    (root / "folder").symlink_to(other)
    (root / "plain" / "link").symlink_to(other / "file")
    for relative in ("folder/file", "plain/link"):
        with pytest.raises(CacheCorrupt, match="symbolic link"):
            read_checked(LocalStorage(root), relative, digest(b"secret"))


def test_a_cache_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_checked(LocalStorage(tmp_path / "link"), "file", digest(b"x")) == b"x"


@given(st.binary(min_size=1, max_size=64), st.data())
@settings(max_examples=60, deadline=None)
def test_every_flipped_bit_and_every_length_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("file")
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    length = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    for damaged in (bytes(flipped), content[:length], content + b"\0"):
        (root / "file").write_bytes(damaged)
        with pytest.raises(CacheCorrupt, match="file"):
            read_checked(LocalStorage(root), "file", digest(content))
    (root / "file").write_bytes(content)
    assert read_checked(LocalStorage(root), "file", digest(content)) == content
    assert digest_on_disk(root / "file") == digest(content)


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name in ("folder", "pipe"):
        with pytest.raises(CacheCorrupt, match="not a plain file"):
            read_bounded(LocalStorage(tmp_path), name, max_bytes=9, what="a test")
    for name in ("missing", "file/below"):
        with pytest.raises(CacheCorrupt, match="a test is missing"):
            read_bounded(LocalStorage(tmp_path), name, max_bytes=9, what="a test")


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no disk, and reading it would take all memory
    with pytest.raises(CacheCorrupt, match="1,099,511,627,776 bytes"):
        read_checked(LocalStorage(tmp_path), "huge", FileDigest(num_bytes=10, sha256="0" * 64))
