"""Single files: whole or not there, checked before they are believed, never outside the cache."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd.cache import files
from scalekd.cache.files import (
    FileDigest,
    commit_file,
    digest,
    digest_on_disk,
    inside,
    read_bounded,
    read_checked,
    remove_abandoned,
)
from scalekd.errors import CacheCorrupt, EnvironmentFault

# Loads the one module by its file: the package around it would import torch.
_KILLED_BETWEEN = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
Path.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
files.commit_file(Path(sys.argv[2]), b"new content")
"""


def test_a_writer_killed_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    commit_file(path, b"old")
    command = [sys.executable, "-c", _KILLED_BETWEEN, files.__file__, str(path)]
    found = subprocess.run(command, timeout=60)
    assert found.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = [p for p in tmp_path.iterdir() if p != path]
    assert left.read_bytes() == b"new content"
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_synced_before_the_name_and_the_name_before_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def recorded_sync(descriptor: int) -> None:
        events.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "content")
        sync(descriptor)

    def recorded_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    commit_file(tmp_path / "file", b"x")
    assert events == ["content", "rename", "folder"]
    events.clear()
    commit_file(tmp_path / "new" / "deeper" / "file", b"x")
    # A new folder is an entry of its parent, which must be on disk as well.
    assert events == ["folder", "folder", "content", "rename", "folder"]


def test_write_once_keeps_the_first_content(tmp_path: Path) -> None:
    path = tmp_path / "record"
    assert commit_file(path, b"first", exclusive=True)
    assert not commit_file(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_the_systems_refusal_says_what_to_do_and_leaves_nothing(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(EnvironmentFault, match=advice):
        commit_file(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_is_needed_is_said(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(EnvironmentFault, match="a file stands where a folder is needed"):
        commit_file(tmp_path / "taken" / "file", b"x")


def test_only_temporary_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files.host_name()
    alive = tmp_path / f".a.{host}-{os.getpid()}-0123abcd.partial"
    gone = tmp_path / f".b.{host}-{dead.pid}-0123abcd.partial"
    foreign = tmp_path / ".c.another_machine-1-0123abcd.partial"
    stale = tmp_path / ".d.another_machine-1-0123abcd.partial"
    for path in (alive, gone, foreign, stale):
        path.write_bytes(b"")
    os.utime(stale, (0, 0))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, foreign])


@pytest.mark.parametrize(
    "relative",
    ["../x", "a/../../x", "a/..", "..", "/etc/passwd", "", ".", "a\\..\\x", "a\0b", "//x"],
)
def test_a_path_that_could_lead_elsewhere_is_refused(relative: str, tmp_path: Path) -> None:
    with pytest.raises(CacheCorrupt, match="not a path inside"):
        inside(tmp_path, relative)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_text_leads_outside(relative: str) -> None:
    root = Path("/nowhere/cache")
    try:
        found = inside(root, relative)
    except CacheCorrupt:
        return
    assert Path(os.path.normpath(found)).is_relative_to(root)


def test_symbolic_links_are_refused_at_every_level(tmp_path: Path) -> None:
    root, other = tmp_path / "cache", tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"secret")
    (root / "plain").mkdir(parents=True)
    (root / "folder").symlink_to(other)
    (root / "plain" / "link").symlink_to(other / "file")
    for relative in ("folder/file", "plain/link"):
        with pytest.raises(CacheCorrupt, match="symbolic link"):
            read_checked(root, relative, digest(b"secret"))


def test_a_cache_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_checked(tmp_path / "link", "file", digest(b"x")) == b"x"


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
            read_checked(root, "file", digest(content))
    (root / "file").write_bytes(content)
    assert read_checked(root, "file", digest(content)) == content
    assert digest_on_disk(root / "file") == digest(content)


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name in ("folder", "pipe"):
        with pytest.raises(CacheCorrupt, match="not a plain file"):
            read_bounded(tmp_path / name, max_bytes=9, what="a test")
    for name in ("missing", "file/below"):
        with pytest.raises(CacheCorrupt, match="a test is missing"):
            read_bounded(tmp_path / name, max_bytes=9, what="a test")


def test_a_large_file_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no disk, and reading it would take all memory
    with pytest.raises(CacheCorrupt, match="1,099,511,627,776 bytes"):
        read_checked(tmp_path, "huge", FileDigest(num_bytes=10, sha256="0" * 64))
