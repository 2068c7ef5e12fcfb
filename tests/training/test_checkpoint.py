import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.errors import DataError, EnvironmentFault
from scalekd.training import Checkpoint, Position, find_checkpoint, read_checkpoint
from scalekd.training import checkpoint as module
from scalekd.training.checkpoint import STUDENT_FILE, copy_checkpoint, write_checkpoint
from scalekd.training.logs import EpochSummary, RunningMeans, StepLog
from scalekd.training.random_state import (
    preserved_random_state,
    random_state,
    restore_random_state,
)


def a_checkpoint(number: int) -> Checkpoint:
    shared = torch.full((3,), float(number))
    return Checkpoint(
        position=Position(epoch=number, num_updates=10 * number),
        weights={STUDENT_FILE: {"a": shared, "tied": shared}},
        training={"optimizer": {"state": {}}, "random_states": [random_state()]},
        facts={"metrics": {"top1": 50.0}},
    )


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(2))
    found = read_checkpoint(tmp_path / "last")
    assert found.position == Position(epoch=2, num_updates=20)
    assert torch.equal(found.weights[STUDENT_FILE]["tied"], torch.full((3,), 2.0))
    assert found.facts == {"metrics": {"top1": 50.0}}
    restore_random_state(found.training["random_states"][0])


@pytest.mark.parametrize("moment", ["save_file", "sync", "_swap_in"])
def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))

    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, moment, full)
    with pytest.raises(EnvironmentFault, match="The one before it is untouched"):
        write_checkpoint(tmp_path / "last", a_checkpoint(2))
    assert read_checkpoint(tmp_path / "last").position.epoch == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_crash_between_the_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    rename = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if self.name.endswith(".writing"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "last", a_checkpoint(2))
    monkeypatch.undo()
    assert not (tmp_path / "last").exists()
    found = find_checkpoint(tmp_path / "last")
    assert found is not None
    assert read_checkpoint(found).position.epoch == 1
    write_checkpoint(tmp_path / "last", a_checkpoint(3))
    assert read_checkpoint(tmp_path / "last").position.epoch == 3


def test_a_copy_survives_the_next_write(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    copy_checkpoint(tmp_path / "last", tmp_path / "model_best")
    write_checkpoint(tmp_path / "last", a_checkpoint(2))
    assert read_checkpoint(tmp_path / "model_best").position.epoch == 1


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("raise SystemExit('ran')",))

    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    torch.save({"optimizer": Payload()}, tmp_path / "last/training_state.pt")
    with pytest.raises(DataError, match="cannot be read"):
        read_checkpoint(tmp_path / "last")


def test_another_format_version_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    path = tmp_path / "last/state.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(DataError, match="format version 9"):
        read_checkpoint(tmp_path / "last")


def test_random_states_are_put_back() -> None:
    import random

    import numpy as np

    def draws() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), np.random.randn(), float(torch.rand(()))

    np.random.randn()
    state = random_state()
    first = draws()
    with preserved_random_state():
        draws()
    second = draws()
    restore_random_state(state)
    assert (draws(), draws()) == (first, second)


def test_a_step_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    for step in (10, 20, 30):
        log.write({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 4')  # a crash cut the line
    log.keep_until(20)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [10, 20]


def test_a_summary_keeps_columns_that_come_later(tmp_path: Path) -> None:
    summary = EpochSummary(tmp_path / "summary.csv")
    summary.write({"epoch": 0, "loss": 1.5})
    summary.write({"epoch": 1, "loss": 1.25, "top1": 40})
    summary.write({"epoch": 2, "loss": 1.0})
    again = EpochSummary(tmp_path / "summary.csv")
    again.keep_until(2)
    again.write({"epoch": 2, "loss": 0.5, "top1": 60})
    assert (tmp_path / "summary.csv").read_text() == (
        "epoch,loss,top1\n0,1.5,\n1,1.25,40\n2,0.5,60\n"
    )


def test_means_are_weighted_and_merge() -> None:
    first, second = RunningMeans(), RunningMeans()
    first.add({"loss": 1.0}, 3)
    second.add({"loss": 5.0}, 1)
    first.merge(second.state())
    assert first.means() == {"loss": 2.0}


def test_what_is_not_finite_counts_in_no_mean() -> None:
    means = RunningMeans()
    means.add({"loss": 1.0, "grad_norm": float("inf")}, 3)
    assert means.means() == {"loss": 1.0}
    means.add({"loss": 5.0, "grad_norm": 2.0}, 1)
    again = RunningMeans()
    for _ in range(2):
        again.merge(means.state(shares=2))
    again.merge({"sums": {"seconds": 0.0}, "weight": 0.0})  # as older checkpoints have it
    assert again.means() == {"loss": 2.0, "grad_norm": 2.0, "seconds": 0.0}
