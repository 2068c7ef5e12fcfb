import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.errors import DataError, EnvironmentFault
from scalekd.training import Checkpoint, Position, find_checkpoint, read_checkpoint
from scalekd.training import checkpoint as module
from scalekd.training.checkpoint import (
    STATE_FILE,
    STUDENT_FILE,
    copy_checkpoint,
    sound_position,
    write_checkpoint,
)
from scalekd.training.logs import EpochSummary, RunningMeans, StepLog, read_summary
from scalekd.training.random_state import (
    preserved_random_state,
    random_state,
    restore_random_state,
)


def rewrite_digests(folder: Path, **changes: Any) -> None:
    """Change ``state.json`` and describe the files as they are, as a hostile author would."""
    state = {**json.loads((folder / STATE_FILE).read_text()), **changes}
    state["files"] = {name: module._digest(folder / name) for name in state["files"]}
    del state["digest"]
    state["digest"] = module._digest_of(state)
    (folder / STATE_FILE).write_text(json.dumps(state))


def a_checkpoint(number: int) -> Checkpoint:
    shared = torch.full((3,), float(number))
    return Checkpoint(
        position=Position(epoch=number, num_updates=10 * number),
        weights={STUDENT_FILE: {"a": shared, "tied": shared}},
        training={"optimizer": {"state": {}}, "random_states": [random_state()]},
        facts={"metrics": {"top1": 50.0}},
    )


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
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
        if self.name.endswith(".partial"):
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


def test_a_copy_shares_no_bytes_on_disk(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    copy_checkpoint(tmp_path / "last", tmp_path / "model_best")
    for file in (tmp_path / "last").iterdir():
        with file.open("r+b") as damaged:
            damaged.seek(-8, 2)
            damaged.write(b"garbage!")
    assert sound_position(tmp_path / "last") is None
    assert read_checkpoint(tmp_path / "model_best").position.epoch == 1


@pytest.mark.parametrize("name", [STUDENT_FILE, "training_state.pt", STATE_FILE])
def test_one_flipped_bit_is_detected(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    path = tmp_path / "last" / name
    content = bytearray(path.read_bytes())
    # The last tensor value; a storage inside the archive; the digit of "epoch": 1.
    where = {STUDENT_FILE: len(content) - 1, "training_state.pt": len(content) // 2}
    content[where.get(name) or content.index(b'"epoch": 1') + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"cannot be read.*{name} does not have the"):
        read_checkpoint(tmp_path / "last")
    assert sound_position(tmp_path / "last") is None


def test_a_file_of_another_checkpoint_is_detected(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    write_checkpoint(tmp_path / "other", a_checkpoint(2))
    (tmp_path / "other" / STUDENT_FILE).replace(tmp_path / "last" / STUDENT_FILE)
    with pytest.raises(DataError, match=f"{STUDENT_FILE} does not have"):
        read_checkpoint(tmp_path / "last")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    (tmp_path / "last" / STUDENT_FILE).unlink()
    with pytest.raises(DataError, match=f"{STUDENT_FILE} is missing"):
        read_checkpoint(tmp_path / "last")


def test_a_checkpoint_without_digests_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(3))  # as scalekd 0.1 wrote it
    path = tmp_path / "last" / STATE_FILE
    state = json.loads(path.read_text())
    del state["digest"], state["files"]
    path.write_text(json.dumps(state))
    assert read_checkpoint(tmp_path / "last").position.epoch == 3
    assert sound_position(tmp_path / "last") == Position(epoch=3, num_updates=30)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": -1},
        {"epoch": "1"},
        {"epoch": 10**30},
        {"num_updates": 1.5},
        {"epoch_samples": None},
        {"samples_viewed": True},
    ],
)
def test_an_impossible_position_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    rewrite_digests(tmp_path / "last", **changes)
    with pytest.raises(DataError, match=f"{next(iter(changes))} is .* not a count"):
        read_checkpoint(tmp_path / "last")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[]", "null", "{}", '"' * 9, "\x00", '{"format_version": 1}', "9" * 5000],
)
def test_a_damaged_state_is_one_line(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    (tmp_path / "last" / STATE_FILE).write_text(text)
    with pytest.raises(DataError, match="last: ") as caught:
        read_checkpoint(tmp_path / "last")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def _write_many(folder: Path, first: int) -> None:
    for number in range(first, first + 25):
        try:
            write_checkpoint(folder, a_checkpoint(number))
        except EnvironmentFault:
            return


def test_two_concurrent_writers_leave_one_complete_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_many, args=(tmp_path / "last", first)) for first in (1, 1001)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = read_checkpoint(tmp_path / "last")
    assert found.weights[STUDENT_FILE]["a"].tolist() == [float(found.position.epoch)] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("raise SystemExit('ran')",))

    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    torch.save({"optimizer": Payload()}, tmp_path / "last/training_state.pt")
    rewrite_digests(tmp_path / "last")
    with pytest.raises(DataError, match="cannot be read"):
        read_checkpoint(tmp_path / "last")


def test_another_format_version_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last", a_checkpoint(1))
    path = tmp_path / "last/state.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(DataError, match="format version 9"):
        read_checkpoint(tmp_path / "last")


def test_random_states_are_restored() -> None:
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


def test_a_step_log_drops_lines_after_the_checkpoint(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    for step in (10, 20, 30):
        log.write({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 4')  # a crash cut the line
    log.keep_until(20)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [10, 20]


def test_a_damaged_step_log_loses_damaged_lines_only(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    good = [b'{"step": 1}\n', b'{"step": 2.0}\n']
    bad = [
        b"\xff\xfe\n",
        b"[" * 5000 + b"\n",
        b"[]\n",
        b'{"step": "1"}\n',
        b"\n",
        b'{"step": null}\n',
    ]
    bad += [b"\x00" * 9 + b"\n", b'{"step": 1, "x": "' + b"y" * (2 << 20) + b'"}\n']
    log.path.write_bytes(good[0] + b"".join(bad) + good[1] + b'{"step": 1}')
    log.keep_until(20)
    assert log.path.read_bytes() == b"".join(good)


GOOD_SUMMARY = "epoch,samples_viewed,train_loss,seconds\n0,8,1.5,2\n1,16,1.25,2\n"


def test_a_summary_is_read_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text(GOOD_SUMMARY)
    rows = read_summary(tmp_path / "summary.csv")
    assert rows[1] == {"epoch": 1, "samples_viewed": 16, "train_loss": 1.25, "seconds": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"epoch\n",
        b"train_loss,samples_viewed,seconds\n1,1,1\n",
        GOOD_SUMMARY.replace("1.5", "1" * 200_000).encode(),
        GOOD_SUMMARY.replace("1.5", "\0").encode(),
        GOOD_SUMMARY.replace("1.5", "nan").encode(),
        GOOD_SUMMARY.replace("8", "inf").encode(),
        GOOD_SUMMARY.replace("8", "1e300").encode(),
        GOOD_SUMMARY.replace("\n1,", "\n0.5,").encode(),
        GOOD_SUMMARY.replace("\n1,", "\n-1,").encode(),
        GOOD_SUMMARY.replace("\n1,", "\n,").encode(),
        GOOD_SUMMARY.replace("1.5,2", "1.5").encode(),
        GOOD_SUMMARY.replace("1.5,2", "1.5,2,3,4").encode(),
        GOOD_SUMMARY.replace("1.5", "é").encode("latin-1"),
        ("x" * 5000 + "," + GOOD_SUMMARY).encode(),
        (",".join(map(str, range(5000))) + "\n").encode(),
    ],
)
def test_a_damaged_summary_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "summary.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"summary\.csv: ") as caught:
        read_summary(path)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_summary(path)


def test_a_summary_keeps_columns_that_appear_later(tmp_path: Path) -> None:
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


def test_values_that_are_not_finite_are_left_out_of_means() -> None:
    means = RunningMeans()
    means.add({"loss": 1.0, "grad_norm": float("inf")}, 3)
    assert means.means() == {"loss": 1.0}
    means.add({"loss": 5.0, "grad_norm": 2.0}, 1)
    again = RunningMeans()
    for _ in range(2):
        again.merge(means.state(shares=2))
    again.merge({"sums": {"seconds": 0.0}, "weight": 0.0})  # as older checkpoints have it
    assert again.means() == {"loss": 2.0, "grad_norm": 2.0, "seconds": 0.0}
