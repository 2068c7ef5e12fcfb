"""Signals to all processes of a group, as schedulers and terminals send them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TIMEOUT_SECONDS = 120
# `ready` is written by every request; the wait that follows is where the signal comes.
SCRIPT = """
import signal, sys, time
from pathlib import Path
from torch.utils.data import Dataset
from scalekd.loading._workers import in_workers

mode, is_remote, folder = sys.argv[1], sys.argv[2] == "remote", Path(sys.argv[3])

class Slow(Dataset):
    def __getitem__(self, request):
        (folder / f"ready-{request}").touch()
        time.sleep(3600 if mode == "hung" else 1.5)
        return request

    def __getitems__(self, requests):
        return [self[request] for request in requests]

if __name__ == "__main__":
    if mode == "obedient":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: print("told", flush=True))
    batches = in_workers(Slow(), [[n] for n in range(4)], num_workers=2, is_remote=is_remote)
    if mode == "hung":
        import threading
        threading.Timer(6, lambda: signal.raise_signal(signal.SIGALRM)).start()
        signal.signal(signal.SIGALRM, lambda number, frame: sys.exit(7))
    print(next(batches) if mode == "open" else list(batches), flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script as the leader of a group of its own, and waits until workers work."""
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def begin(mode: str, place: str = "local") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "script.py", mode, place, str(tmp_path)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process

    yield begin
    for process in started:
        if _members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _members(group: int) -> list[int]:
    """Living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member_of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(member_of) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _ended(group: int) -> bool:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not _members(group)


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_continue_after_a_signal_to_their_group(
    place: str, number: signal.Signals, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("obedient", place)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert (process.returncode, err) == (0, "")
    assert out.split("\n")[:2] == ["told", "[[0], [1], [2], [3]]"]
    assert _ended(process.pid)


@linux
def test_workers_end_without_output_if_the_main_process_is_killed(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start("plain")
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT_SECONDS)  # until the workers have closed it
    assert (process.returncode, err) == (-signal.SIGTERM, "")
    assert _ended(process.pid)


@linux
def test_a_program_ends_although_a_loader_is_open(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start("open")
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert (process.returncode, out, err) == (0, "[0]\n", "")
    assert _ended(process.pid)


@linux
def test_a_worker_that_hangs_ends_with_the_main_process(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start("hung")
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 7
    assert _ended(process.pid)
