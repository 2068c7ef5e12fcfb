"""Files of a folder are written completely or not at all, and only inside the folder."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd.errors import CacheCorrupt, EnvironmentFault
from scalekd.storage import files
from scalekd.storage.files import commit_file, inside, remove_abandoned

_KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from scalekd.storage.files import commit_file
Path.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
commit_file(Path(sys.argv[1]), b"new content")
"""


def test_a_writer_killed_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    commit_file(path, b"old")
    command = [sys.executable, "-c", _KILLED_BETWEEN, str(path)]
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
def test_an_error_of_the_system_gives_advice_and_leaves_no_file(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(EnvironmentFault, match=advice):
        commit_file(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_instead_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(EnvironmentFault, match="there is a file where a folder is needed"):
        commit_file(tmp_path / "taken" / "file", b"x")


def test_only_temporary_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files.host_name()
    here = "".join(filter(str.isdigit, files.process_namespace()))
    alive = files.temporary_beside(tmp_path / "a")
    assert alive.name.startswith(f".a.{host}-{here}-{os.getpid()}-")
    gone = tmp_path / f".b.{host}-{here}-{dead.pid}-0123abcd.partial"
    foreign = tmp_path / f".c.another_machine-{here}-{dead.pid}-0123abcd.partial"
    contained = tmp_path / f".d.{host}-{here}1-{dead.pid}-0123abcd.partial"
    stale = tmp_path / f".e.another_machine-{here}-1-0123abcd.partial"
    for path in (alive, gone, foreign, contained, stale):
        path.write_bytes(b"")
    os.utime(stale, (0, 0))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, foreign, contained])


@pytest.mark.parametrize(
    "relative",
    ["../x", "a/../../x", "a/..", "..", "/etc/passwd", "", ".", "a\\..\\x", "a\0b", "//x"],
)
def test_a_path_that_could_lead_elsewhere_is_refused(relative: str, tmp_path: Path) -> None:
    with pytest.raises(CacheCorrupt, match="not a path inside"):
        inside(tmp_path, relative)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_relative_path_leads_outside_the_folder(relative: str) -> None:
    root = Path("/nowhere/cache")
    try:
        found = inside(root, relative)
    except CacheCorrupt:
        return
    assert Path(os.path.normpath(found)).is_relative_to(root)
