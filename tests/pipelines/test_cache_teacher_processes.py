"""Stage one in processes of its own: killed at random, two at once, two after another."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scalekd.cache.care.verify import verify
from scalekd.cli.main import main

pytestmark = pytest.mark.slow

FileContents = Callable[[Path], dict[str, bytes]]


def _arguments(images: Path, output: Path, **changes: object) -> list[str]:
    options = {
        "--model": "test_vit.r160_in1k",
        "--data-dir": images,
        "--output": output,
        "--img-size": 32,
        "--model-kwargs": "num_classes=10",
        "--passes": 2,
        "--codec": "float16",
        "--shard-size": 10,
        "-b": 8,
        "-j": 1,
        **{f"--{name}": value for name, value in changes.items()},
    }
    pairs = [str(part) for pair in options.items() for part in pair]
    return ["cache-teacher", "--no-pretrained", "--json", *pairs]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _start(arguments: list[str], *launcher: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "scalekd", *arguments],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _kill_all(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _finished(process: subprocess.Popen[str]) -> str:
    """Standard output of a process that ends well, in time."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        _kill_all(process)
        raise
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def reference(
    tiny_images: Path, tmp_path_factory: pytest.TempPathFactory, file_contents: FileContents
) -> dict[str, bytes]:
    """The files of an undisturbed run, in this process."""
    output = tmp_path_factory.mktemp("reference") / "cache"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    main(_arguments(tiny_images, output))
    torch.set_num_threads(before)
    return file_contents(output)


def test_killed_runs_are_finished_to_the_same_bytes(
    tiny_images: Path,
    tmp_path: Path,
    reference: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    """SIGKILL at two random moments after the plan stands; then once to the end."""
    output, chance = tmp_path / "cache", random.Random(0)
    arguments = _arguments(tiny_images, output)
    committed: set[Path] = set()
    for _ in range(2):
        process = _start(arguments)
        deadline = time.monotonic() + 120
        while set(output.glob("records/0*/*.json")) <= committed and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        _kill_all(process)
        assert committed <= set(output.glob("records/0*/*.json"))
        committed = set(output.glob("records/0*/*.json"))
    assert committed
    assert f'"shards_found": {len(committed)}' in _finished(_start(arguments))
    assert file_contents(output) == reference
    assert verify(output).problems == []


def test_two_processes_write_the_same_cache_as_one(
    tiny_images: Path,
    tmp_path: Path,
    reference: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    output = tmp_path / "cache"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    assert '"shards_written": 14' in _finished(_start(_arguments(tiny_images, output), *launcher))
    assert file_contents(output) == reference


def test_two_jobs_at_once_share_a_cache_by_shards(
    tiny_images: Path,
    tmp_path: Path,
    reference: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    """As two machines would; whoever ends last writes the manifest."""
    output = tmp_path / "cache"
    jobs = [_start(_arguments(tiny_images, output, shards=part)) for part in ("0-2", "3-6")]
    for job in jobs:
        _finished(job)
    assert file_contents(output) == reference
