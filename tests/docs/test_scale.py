"""``docs/scale.md``: every launch line runs as it is written, on tiny data in two processes."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scalekd.cache.care.verify import verify

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 300
NUM_SHARDS = 7
TEACHER = (
    "--model test_vit --no-pretrained --img-size 32 --model-kwargs num_classes=10"
    " --data-dir imagenet --output new-cache --codec float16 --shard-size 10 -b 8 -j 0"
)
STUDENT = (
    "--cache swin_l-cache --data-dir imagenet --val-split none --model test_resnet --objective kd"
    " --epochs 1 -b 8 -j 0 --amp no --output run"
)

Programs = dict[str, str]
Launch = Callable[..., None]


@pytest.fixture(scope="module")
def lines(programs: Callable[[str, str], Programs]) -> Programs:
    return programs("docs/scale.md", "sh")


@pytest.fixture
def folder(working_folder: Callable[[], Path]) -> Path:
    return working_folder()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def launch(lines: Programs, folder: Path) -> Launch:
    """Runs a named program in one shell for each set of variables, all at once."""

    def run(name: str, *shells: dict[str, object], processes: int = 2) -> None:
        settings = f"teacher=({TEACHER})\nstudent=({STUDENT})\nMAIN=127.0.0.1\n"
        settings += f"PROCESSES={processes}\nPORT={_free_port()}\n"
        path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        started = [
            subprocess.Popen(
                ["bash", "-euc", settings + lines[name]],
                cwd=folder,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PATH": path,
                    **{variable: str(value) for variable, value in shell.items()},
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for shell in shells or ({},)
        ]
        for process in started:
            try:
                printed, _ = process.communicate(timeout=TIMEOUT_SECONDS)
            finally:
                process.kill()
            assert process.returncode == 0, printed

    return run


def _assert_cached(folder: Path) -> None:
    assert verify(folder / "new-cache").problems == []
    assert len(list(folder.glob("new-cache/records/0000/*.json"))) == NUM_SHARDS


def _assert_trained(folder: Path, *, processes: int) -> None:
    state = json.loads((folder / "run/last/state.json").read_text())
    assert state["epoch"] == 1
    assert state["num_updates"] == 70 // (8 * processes)


def test_caching_and_training_run_on_one_machine(launch: Launch, folder: Path) -> None:
    launch("one-machine-cache")
    _assert_cached(folder)
    launch("one-machine-train")
    _assert_trained(folder, processes=2)


def test_accelerate_launch_trains_a_student(launch: Launch, folder: Path) -> None:
    launch("accelerate", processes=1)  # as the document says: on CPUs, it starts no more
    _assert_trained(folder, processes=1)


def test_caching_and_training_run_on_two_machines(launch: Launch, folder: Path) -> None:
    ranks = [{"NODE_RANK": 0}, {"NODE_RANK": 1}]
    launch("two-machines-cache", *ranks, processes=1)
    _assert_cached(folder)
    launch("two-machines-train", *ranks, processes=1)
    _assert_trained(folder, processes=2)


def test_an_array_divides_the_shards_itself(launch: Launch, folder: Path) -> None:
    launch("slurm-cache", {"SLURM_ARRAY_TASK_ID": 0}, {"SLURM_ARRAY_TASK_ID": 1})
    _assert_cached(folder)


def test_the_tasks_of_an_array_write_every_shard_once(launch: Launch, folder: Path) -> None:
    array = {"SHARDS": NUM_SHARDS, "SLURM_ARRAY_TASK_COUNT": 2}
    records = "new-cache/records/0000/*.json"
    launch("slurm-cache-shards", {**array, "SLURM_ARRAY_TASK_ID": 1})
    assert [path.stem for path in sorted(folder.glob(records))] == [f"{n:06d}" for n in range(3, 7)]
    launch("slurm-cache-shards", {**array, "SLURM_ARRAY_TASK_ID": 0})
    _assert_cached(folder)


def test_a_slurm_job_of_two_nodes_trains_a_student(launch: Launch, folder: Path) -> None:
    """With stand-ins for Slurm's own commands: two tasks on this machine."""
    stand_ins = {
        "scontrol": 'printf "127.0.0.1\\nsecond\\n"',
        "srun": '"$@" & first=$!; "$@"; wait $first',
    }
    for name, script in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\nset -e\n{script}\n")
        (folder / name).chmod(stat.S_IRWXU)
    slurm = {
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_NNODES": 2,
        "SLURM_JOB_ID": 7,
        "SLURM_CPUS_PER_TASK": 1,
    }
    launch("slurm-train", slurm, processes=1)
    _assert_trained(folder, processes=2)


def test_every_program_of_the_page_is_tested(lines: Programs) -> None:
    text = Path(__file__).read_text()
    assert [name for name in lines if name != "settings" and f'"{name}"' not in text] == []
