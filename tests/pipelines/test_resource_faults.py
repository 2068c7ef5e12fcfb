"""Stage one when the machine fails it: it says what to do, and the same command goes on."""

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reliability import kill_harness as harness

_NOBODY = 65534


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that an unprivileged process can reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def images(folder: Path) -> Path:
    path: Path = harness.write_images(folder / "images")
    return path


@pytest.fixture(scope="module")
def reference(folder: Path, images: Path) -> dict[str, bytes]:
    """An undisturbed run's files."""
    job = harness.Job(images, folder / "reference", folder / "log", 1)
    assert job.wait(60)
    files: dict[str, bytes] = harness.contents(folder / "reference")
    return files


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs the command to its end; returns exit code and last line."""

    def start(
        output: Path,
        prepare: Callable[[], None] = lambda: None,
    ) -> tuple[int, str]:
        log = tmp_path / f"log-{time.monotonic_ns()}"
        job = harness.Job(images, output, log, 1, prepare)
        assert job.wait(60), f"it hangs: {log.read_text()}"
        lines = log.read_text().splitlines()
        assert not any("Traceback" in line for line in lines), log.read_text()
        return job.codes[0], lines[-1]

    return start


def _after_a_few_records(act: Callable[[], None]) -> None:
    """In the process of the job, so that the moment does not depend on how busy the machine is."""
    link = os.link
    records = 0

    def and_then(source: Path, target: Path) -> None:
        nonlocal records
        link(source, target)
        records += "records/0" in str(target) and str(target).endswith(".json")
        if records == 3:
            os.link = link
            act()

    os.link = and_then  # type: ignore[assignment]


def _kill_a_worker() -> None:
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


def _left_by_writers(root: Path) -> list[Path]:
    return [*root.rglob("*.lease"), *root.rglob("*.partial")]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_cache_can_be_continued_after_a_signal(
    sent: signal.Signals,
    code: int,
    tmp_path: Path,
    run: Callable[..., tuple[int, str]],
    reference: dict[str, bytes],
) -> None:
    """To the whole process group, as a terminal and a scheduler send it."""
    output = tmp_path / "cache"
    found, line = run(output, prepare=lambda: _after_a_few_records(lambda: os.killpg(0, sent)))
    assert found == code
    assert "committed work is kept" in line
    assert not _left_by_writers(output)
    assert run(output)[0] == 0
    assert harness.contents(output) == reference


def test_a_killed_worker_is_reported_in_one_line(
    tmp_path: Path,
    run: Callable[..., tuple[int, str]],
    reference: dict[str, bytes],
) -> None:
    output = tmp_path / "cache"

    code, line = run(output, prepare=lambda: _after_a_few_records(_kill_a_worker))
    assert code == 5
    assert "fewer workers (-j)" in line
    assert run(output)[0] == 0
    assert harness.contents(output) == reference


@pytest.mark.parametrize("limit", [8, 12, 14, 16])
def test_too_few_open_files_end_with_advice_and_do_not_hang(
    limit: int,
    tmp_path: Path,
    run: Callable[..., tuple[int, str]],
    reference: dict[str, bytes],
) -> None:
    """Whichever the file is that cannot be opened: an image, a cache's, a channel of a worker."""
    output = tmp_path / "cache"
    code, line = run(
        output, prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    )
    assert code == 5
    assert "ulimit -n" in line
    assert run(output)[0] == 0
    assert harness.contents(output) == reference


def test_a_full_disk_keeps_what_was_committed(
    tmp_path: Path,
    run: Callable[..., tuple[int, str]],
    reference: dict[str, bytes],
) -> None:
    """A file system of its own, of one megabyte, which then grows."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs more rights")
    try:
        code, line = run(disk / "cache")
        assert code == 5
        assert "the disk is full: free space and run the same command again" in line
        assert list((disk / "cache").glob("records/0*/*.json"))
        grow = ["mount", "-o", "remount,size=16m", str(disk)]
        subprocess.run(grow, check=True, capture_output=True)
        assert run(disk / "cache")[0] == 0
        assert harness.contents(disk / "cache") == reference
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_without_permission_is_refused_before_any_work(
    folder: Path, run: Callable[..., tuple[int, str]]
) -> None:
    theirs = folder / "theirs"
    theirs.mkdir(mode=0o755)
    code, line = run(theirs / "cache", prepare=lambda: os.setuid(_NOBODY))
    assert code == 5
    assert f"{theirs} cannot be written to" in line
    assert not list(theirs.iterdir())
