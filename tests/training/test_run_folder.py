"""A run's folder: who may train in it, where a run goes on, and what is never removed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.errors import DataError, EnvironmentFault, UsageError
from scalekd.training import Trainer

Make = Callable[..., Trainer]


def positions(run: Path) -> dict[str, int]:
    return {
        path.parent.name: json.loads(path.read_text())["epoch"] for path in run.glob("*/state.json")
    }


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_state(run: Path) -> None:
    (run / "last/state.json").unlink()


def remove_folder(run: Path) -> None:
    for file in (run / "last").iterdir():
        file.unlink()
    (run / "last").rmdir()


def flip_a_bit(run: Path) -> None:
    damage(run / "last/model.safetensors")


def cut_off(run: Path) -> None:
    path = run / "last/training_state.pt"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("loss", [remove_state, remove_folder, flip_a_bit, cut_off])
def test_without_last_the_newest_intact_checkpoint_is_resumed(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: Any
) -> None:
    run = tmp_path / "run"
    make_trainer(run, epochs=2).fit()
    loss(run)
    result = make_trainer(run, epochs=3, resume="auto").fit()
    assert result.epochs == 3
    rows = (run / "summary.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["0", "1", "2"]
    said = capsys.readouterr().err.replace("\n", "")
    assert "last is missing or damaged: continuing from" in said
    assert "resuming at epoch 3" in said
    assert positions(run)["last"] == 3


def test_resuming_a_finished_run_changes_no_checkpoint(make_trainer: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(run, epochs=2).fit()
    remove_state(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    make_trainer(run, epochs=1, resume="auto").fit()
    for path, content in before.items():
        if path.name not in ("args.yaml", ".lock"):
            assert path.read_bytes() == content, path


def test_a_run_without_an_intact_checkpoint_is_not_started_again(
    make_trainer: Make, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    make_trainer(run, epochs=1).fit()
    for folder in ("last", "model_best", "checkpoint-0"):
        damage(run / folder / "objective.safetensors")
        damage(run / folder / "model.safetensors")
    before = (run / "summary.csv").read_text(), (run / "log.jsonl").read_text()
    with pytest.raises(DataError, match=r"last, model_best, checkpoint-0.*--overwrite"):
        make_trainer(run, resume="auto").fit()
    assert ((run / "summary.csv").read_text(), (run / "log.jsonl").read_text()) == before
    for folder in ("last", "model_best", "checkpoint-0"):
        for file in (run / folder).iterdir():
            file.unlink()
        (run / folder).rmdir()
    with pytest.raises(DataError, match=r"checkpoints are gone \(1 epochs"):
        make_trainer(run, resume="auto").fit()
    assert (run / "summary.csv").read_text() == before[0]
    result = make_trainer(run, epochs=1, overwrite=True).fit()
    assert result.epochs == 1


def test_a_run_killed_before_its_first_checkpoint_starts(
    make_trainer: Make, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(run, epochs=1)
    trainer._run.claim(trainer.config)
    trainer._run.close()
    assert make_trainer(run, epochs=1, resume="auto").fit().epochs == 1


def test_overwrite_starts_again_and_keeps_other_files(make_trainer: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(run, epochs=3).fit()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        make_trainer(run, epochs=1).fit()
    with pytest.raises(UsageError, match="--overwrite and --resume"):
        make_trainer(run, epochs=1, overwrite=True, resume="auto").fit()
    assert positions(run)["last"] == 3
    make_trainer(run, epochs=1, overwrite=True).fit()
    assert positions(run) == {"last": 1, "model_best": 1, "checkpoint-0": 1}
    assert (run / "notes.txt").read_text() == "mine"
    assert len((run / "summary.csv").read_text().splitlines()) == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not a training run"):
        make_trainer(other, epochs=1, overwrite=True).fit()
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_another_runs_checkpoint_does_not_replace_a_run(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "one", epochs=1).fit()
    make_trainer(tmp_path / "two", epochs=2).fit()
    with pytest.raises(UsageError, match="not of the run in"):
        make_trainer(tmp_path / "two", resume=str(tmp_path / "one")).fit()
    assert positions(tmp_path / "two")["last"] == 2
    make_trainer(tmp_path / "three", epochs=2, resume=str(tmp_path / "one")).fit()
    assert positions(tmp_path / "three")["last"] == 2


def test_resuming_from_an_older_checkpoint_prints_a_note(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    make_trainer(run, epochs=3).fit()
    make_trainer(run, epochs=3, resume=str(run / "checkpoint-0")).fit()
    assert "the rows of 2 epochs after the checkpoint are dropped" in capsys.readouterr().err


HOLDER = """
import os, sys, time
from pathlib import Path
from scalekd.training import TrainConfig
from scalekd.training.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
config = TrainConfig(model="test_resnet", output=sys.argv[1], resume="auto", objective="none")
run.claim(config)
if os.fork() == 0:  # a loader's worker, which outlives its parent's SIGKILL for a while
    time.sleep(60)
print("ready", flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time_trains_in_a_folder(make_trainer: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(run, epochs=1).fit()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        for options in ({"resume": "auto"}, {"overwrite": True}, {}):
            with pytest.raises(EnvironmentFault, match=f"process {holder.pid} on .* is training"):
                make_trainer(run, epochs=2, **options).fit()
        for path, content in before.items():
            assert path.name in (".lock", "args.yaml") or path.read_bytes() == content
        holder.kill()
        holder.wait()
        # The system released the lock with the process; its child does not hold it.
        assert make_trainer(run, epochs=2, resume="auto").fit().epochs == 2
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()


def test_files_of_killed_writers_are_removed(make_trainer: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(run, epochs=1).fit()
    (run / ".last.0123.writing").mkdir()
    (run / ".last.0123.writing/model.safetensors").write_bytes(b"half")
    (run / ".summary.csv.0123.writing").write_text("half")
    make_trainer(run, epochs=2, resume="auto").fit()
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]
