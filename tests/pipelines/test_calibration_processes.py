"""Calibration by several processes: shared, and with the tables of one process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.pipelines.cache_teacher import cache_teacher
from tests.pipelines.calibration_script import config

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("calibration_script.py")
_ROOT = Path(__file__).parents[2]


def _environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), **variables}


def _launch(num_processes: int, folder: Path, images: Path, *more: str) -> list[dict[str, Any]]:
    notes = folder / "notes"
    notes.mkdir()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"),
        *(str(num_processes), str(SCRIPT), str(images), str(folder / "cache"), str(notes), *more),
    ]
    done = subprocess.run(
        command, env=_environment(), capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((notes / f"{rank}.json").read_text()) for rank in range(num_processes)]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_calibration_and_write_the_same_cache_as_one(
    num_processes: int,
    tmp_path: Path,
    image_bytes: dict[int, bytes],
    image_set: Callable[[Mapping[int, bytes]], Path],
    file_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    # Of every second view 8 make a batch: those of 16 corrupt images leave one of each kind empty.
    images = image_set({**image_bytes, **dict.fromkeys([*range(16, 32), 40], b"no image")})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cache_teacher(config(str(images), str(tmp_path / "one")))
    torch.set_num_threads(before)
    notes = _launch(num_processes, tmp_path, images, "skip")
    assert all(note["views"] for note in notes)
    assert sum(sum(note["views"]) for note in notes) == 70 - 17  # each view once
    assert [note["fits"] for note in notes] == [1, 1, 0][:num_processes]
    assert file_contents(tmp_path / "cache") == file_contents(tmp_path / "one")


def test_all_processes_stop_if_one_cannot_calibrate(
    tmp_path: Path,
    image_bytes: dict[int, bytes],
    image_set: Callable[[Mapping[int, bytes]], Path],
) -> None:
    images = image_set({**image_bytes, 18: b"no image"})  # in the second batch, of process 1
    first, second = (note["error"] for note in _launch(2, tmp_path, images))
    assert first.startswith("ScaleKDError 3 process 1 failed: DataError: ")
    assert second.startswith("DataError 3 ")
    assert not (tmp_path / "cache/plan.json").exists()
    assert not list((tmp_path / "cache").glob(".calibration*"))


def test_a_killed_process_is_reported_by_the_others_in_one_line(
    tmp_path: Path, tiny_images: Path
) -> None:
    """Without ``torchrun``, which would end them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [str(tiny_images), str(tmp_path / "cache"), str(tmp_path), "die"]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env=_environment(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=1200) for process in processes] == [0, 9]
    error = json.loads((tmp_path / "0.json").read_text())["error"]
    assert error.startswith("EnvironmentFault 5 another process of the run was killed")
    assert "\n" not in error
