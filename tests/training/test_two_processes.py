"""Two processes on one machine, as ``torchrun`` starts them; gloo carries what they exchange."""

import csv
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from scalekd.training.checkpoint import find_checkpoint
from tests.training.conftest import headless_teacher

Told = tuple[Path, Any, Any]
TIMEOUT_SECONDS = 240
TIMES = ("seconds", "images_per_second", "data_wait_share")
SCRIPT = Path(__file__).with_name("two_process_script.py")


def launch(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*torchrun, f"--master-port={port}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hung: {process.communicate()}")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def told(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    output = tmp_path_factory.mktemp("processes")
    code, _, err = finish(launch(str(SCRIPT), str(output), str(image_folder)))
    assert code == 0, err
    first, second = (json.loads((output / f"{rank}.json").read_text()) for rank in (0, 1))
    return output, first, second


def test_two_processes_end_with_one_model(told: Told) -> None:
    _, first, second = told
    assert first["whole"] == second["whole"] == "done"
    assert first["weights"] == second["weights"]
    assert first["statistics"] == second["statistics"]  # batch norm's, after evaluation's sharing


def test_gradients_of_student_and_projectors_are_means_over_both_processes(told: Told) -> None:
    for gradients in (told[1]["gradients"], told[2]["gradients"]):
        assert gradients["student"] < 1e-4
        assert gradients["projectors"] < 1e-4


def test_a_label_counts_the_same_in_either_process(told: Told) -> None:
    for partly in (told[1]["partly"], told[2]["partly"]):
        assert partly["gradient"] < 1e-4
    assert told[1]["partly"]["top1"] in (0, 100)  # of one labelled view


def test_a_contrast_chooses_among_the_views_of_both_processes(told: Told) -> None:
    assert max(told[1]["contrast"], told[2]["contrast"]) < 1e-4


def test_a_signal_to_one_process_stops_both_at_one_update(told: Told) -> None:
    _, first, second = told
    assert first["preempted"].startswith("TrainingInterrupted 143 4 signal 15 received")
    assert first["preempted"] == second["preempted"]


def test_a_resumed_run_of_two_processes_ends_the_same(told: Told) -> None:
    output, first, second = told
    assert first["resumed"] == second["resumed"] == "done"
    for name in ("model.safetensors", "ema.safetensors"):
        whole, broken = (load_file(output / run / "last" / name) for run in ("whole", "broken"))
        for tensor in whole:  # of two summands the order is no matter: exact here too
            assert torch.equal(whole[tensor], broken[tensor]), tensor


def test_a_failure_of_one_process_stops_the_other_with_its_code(told: Told) -> None:
    output, first, second = told
    # Epoch 2 is under way: 3 updates of the first, one of the second. The processes agree at the
    # end of the epoch, and until then update nothing.
    assert second["failing"] == "CacheMismatch 4 6 this view is another one"
    assert first["failing"] == (
        "ScaleKDError 4 6 process 1 failed: CacheMismatch: this view is another one"
    )
    for sums in (first["sums"], second["sums"]):
        assert len(set(sums[:5])) == 5
        assert set(sums[4:]) == {sums[4]}
    assert find_checkpoint(output / "failing/last") is not None


def test_reading_late_changes_nothing_for_two_processes(told: Told) -> None:
    output, first, second = told
    assert first["late"] == second["late"] == "done"
    now, late = (load_file(output / run / "last/model.safetensors") for run in ("whole", "late"))
    assert all(torch.equal(now[name], late[name]) for name in now)


def test_a_loss_of_one_process_that_is_not_finite_updates_neither(told: Told) -> None:
    _, first, second = told
    assert second["poisoned"].startswith(
        "TrainingDiverged 1 3 update 3 (epoch 1): task_loss is nan"
    )
    assert first["poisoned"].startswith("ScaleKDError 1 3 process 1 failed: TrainingDiverged")
    assert first["poisoned_sum"] == second["poisoned_sum"]
    assert math.isfinite(first["poisoned_sum"])


def test_an_evaluation_that_fails_costs_neither_process_an_update(told: Told) -> None:
    output, first, second = told
    assert second["unmeasured"] == "DataError 3 3 this image is corrupt"
    assert first["unmeasured"].startswith("ScaleKDError 3 3 process 1 failed")
    assert first["kept"]
    assert first["measured"] == second["measured"] == first["again"] == second["again"] == "done"
    for name in ("model.safetensors", "ema.safetensors"):
        whole, again = (load_file(output / run / "last" / name) for run in ("measured", "again"))
        for tensor in whole:
            assert torch.equal(whole[tensor], again[tensor]), tensor
    # Means are those of both processes in either case.
    tables = []
    for run in ("measured", "again"):
        with (output / run / "summary.csv").open() as file:
            tables.append(
                [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]
            )
    assert tables[0] == tables[1]


def test_every_sample_is_evaluated_once(told: Told, image_folder: Path) -> None:
    output, first, second = told
    assert first["evaluation"] == second["evaluation"]
    assert first["evaluation"]["num_samples"] == 19  # 10 on one process, 9 on the other
    state = load_file(output / "whole/last/model.safetensors")
    model = timm.create_model("test_resnet", num_classes=3)
    model.load_state_dict(state)
    measure = runpy.run_path(str(SCRIPT))["measure"]
    alone = measure(model.eval(), str(image_folder), Accelerator(cpu=True), batch_size=19)
    assert {"top1", "teacher_agreement", "knn_top1"} < alone.keys() == first["evaluation"].keys()
    for name, value in alone.items():
        assert first["evaluation"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_the_command_line_trains_is_preempted_and_resumes(
    cache: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        *("-m", "scalekd", "train-student", f"--cache={cache}", f"--data-dir={image_folder}"),
        *("--model=test_resnet", "--epochs=200", "--batch-size=8", "--workers=0", "--amp=no"),
        *("--objective=kd", "--json", f"--output={run}"),
    ]
    preempted = launch(*command)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while find_checkpoint(run / "last") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    preempted.send_signal(signal.SIGTERM)
    code, _, err = finish(preempted)
    assert code != 0
    state = json.loads((run / "last/state.json").read_text())
    epochs = state["epoch"] + 2
    assert epochs < 200

    resumed = [*command, "--resume=auto", f"--epochs={epochs}"]
    code, out, err = finish(launch(*resumed))
    assert code == 0, err
    assert f"update {state['num_updates']}, after" in err
    lines = [line for line in out.splitlines() if line.strip()]
    assert len(lines) == 1  # one process speaks
    assert json.loads(lines[0])["samples_viewed"] == epochs * 48
    with (run / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(epochs))
    assert float(rows[-1]["eval_num_samples"]) == 19

    code, out, err = finish(launch(*resumed[:-1], f"--epochs={epochs + 1}", processes=1))
    assert code == 0, err
    assert "the run had 2 processes and has 1 now" in " ".join(err.split())


def alone(rank: int, port: int, command: list[str]) -> subprocess.Popen[str]:
    """One process of two without a launcher, so that its own exit code and output are seen."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_within_seconds(
    cache: Path, image_folder: Path, tmp_path: Path, victim: int
) -> None:
    run = tmp_path / "run"
    command = [
        *("-m", "scalekd", "train-student", f"--cache={cache}", f"--data-dir={image_folder}"),
        *("--model=test_resnet", "--epochs=2000", "--batch-size=8", "--workers=0", "--amp=no"),
        *("--objective=kd", "--val-split=none", f"--output={run}"),
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [alone(rank, port, command) for rank in (0, 1)]
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while find_checkpoint(run / "last") is None and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        processes[victim].kill()
        survivor = processes[1 - victim]
        _, err = survivor.communicate(timeout=60)
        assert survivor.returncode == 5, err
        assert "Traceback" not in err
        assert err.count("scalekd: error") == 1
        assert "another process of the run was killed" in err.splitlines()[-1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_two_processes_without_labels_choose_the_same_epoch(
    make_cache: Callable[..., Any],
    image_bytes: Mapping[int, bytes],
    write_tar: Callable[..., Path],
    tmp_path: Path,
) -> None:
    names = {n: f"{n:03d}.{'png' if n % 5 == 0 else 'jpg'}" for n in image_bytes}
    write_tar(tmp_path / "set/train-0.tar", {names[n]: image_bytes[n] for n in range(40)})
    labelled: dict[str, bytes] = {}
    for number in range(40, 70):
        labelled[names[number]] = image_bytes[number]
        labelled[f"{number:03d}.cls"] = b"%d" % (number % 10)
    write_tar(tmp_path / "set/val-0.tar", labelled)
    for split in ("train", "val"):
        make_cache(
            tmp_path / split,
            teacher=headless_teacher(),
            logits="none",
            data_dir=str(tmp_path / "set"),
            split=split,
            passes=1,
        )
    options = {
        "--cache": tmp_path / "train",
        "--data-dir": tmp_path / "set",
        "--val-cache": tmp_path / "val",
        "--model": "test_resnet",
        "--objective": "features",
        "--epochs": 2,
        "--batch-size": 10,
        "--workers": 0,
        "--lr": 1e-3,
        "--output": tmp_path / "run",
    }
    arguments = [str(part) for option in options.items() for part in option]
    code, out, err = finish(launch("-m", "scalekd", "train-student", *arguments, "--json"))
    assert code == 0, err
    result = json.loads(out.strip().splitlines()[-1])
    metrics = result["metrics"]
    assert metrics["train_summary_loss"] > 0
    assert 0 <= metrics["eval_knn_top1"] <= 100
    assert metrics["samples_viewed"] == 80
    assert metrics["eval_feature_loss"] > 0
    assert result["best_epoch"] in (0, 1)
    weights = load_file(tmp_path / "run/last/model.safetensors")
    assert not any("fc" in name for name in weights)  # no classifier
