"""One run watched by every tracker; what each kept is read back with its own reader."""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from scalekd.errors import UsageError
from scalekd.training import Trainer
from scalekd.training.trackers import Trackers, check_trackers, flat

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
Kept = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def kept(cache: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """The folder of a run, and its ``log.jsonl``."""
    root = tmp_path_factory.mktemp("tracked")
    installed = [name for name in TRACKERS if importlib.util.find_spec(name)]
    command = [
        *(sys.executable, "-m", "scalekd", "train-student", f"--cache={cache}", "--model"),
        *("test_resnet", f"--data-dir={image_folder}", f"--output={root / 'run'}", "--workers=0"),
        *("--objective=kd", "--epochs=2", "--batch-size=16", "--amp=no", "--log-interval=1"),
        *("--val-split=none", "--json"),
        *(f"--log-with={name}" for name in installed),
    ]
    known = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    ran = subprocess.run(
        command,
        cwd=root,
        env={
            **known,
            "MLFLOW_TRACKING_URI": (root / "mlruns").as_uri(),
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "TRACKIO_DIR": str(root / "trackio"),
            "HOME": str(root),  # no account of whoever runs the tests
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["epochs"] == 2
    lines = (root / "run/log.jsonl").read_text().splitlines()
    return root, [json.loads(line) for line in lines]


def expected(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a wandb file: LevelDB's log format behind a header of seven bytes."""
    place, data, block = 7, b"", 32768
    while place < len(content):
        if block - place % block < 7:  # too short for the header of a part: filled with zeros
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            yield data
            data = b""


def test_the_log_has_the_number_of_views_at_every_step(kept: Kept) -> None:
    _, records = kept
    assert [record["samples_viewed"] for record in records] == [16, 32, 48, 64, 80, 96]


def test_tensorboard_has_every_value(kept: Kept) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root, records = kept
    events = EventAccumulator(str(root / "run/scalekd")).Reload()
    for name in ("kd_loss", "samples_viewed", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert dict(found) == dict(expected(records, name)), name
    assert [event.step for event in events.Scalars("train_loss")] == [3, 6]


def test_mlflow_has_every_value_and_the_settings(kept: Kept) -> None:
    mlflow = pytest.importorskip("mlflow")
    root, records = kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(tracking_uri=(root / "mlruns").as_uri())
        experiment = client.get_experiment_by_name("scalekd")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.params["distillation.stage3.softmax_scale"] == "5.0"
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "kd_loss")
    assert [(metric.step, metric.value) for metric in history] == expected(records, "kd_loss")


def test_wandb_has_every_value_without_a_network(kept: Kept) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    root, records = kept
    (path,) = (root / "run/wandb").glob("offline-run-*/*.wandb")
    found: dict[int, float] = {}
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
        if "kd_loss" in items:
            found[int(items["_step"])] = json.loads(items["kd_loss"])
    assert found == dict(expected(records, "kd_loss"))


def test_trackio_has_every_value(kept: Kept) -> None:
    pytest.importorskip("trackio")
    root, records = kept
    with sqlite3.connect(root / "trackio/scalekd.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    found = [(step, json.loads(text)) for step, text in rows]
    losses = [(step, values["kd_loss"]) for step, values in found if "kd_loss" in values]
    assert losses == expected(records, "kd_loss")


def test_an_unknown_or_missing_tracker_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(())
    with pytest.raises(UsageError, match=r"--log-with tensorbord: no such .* mean .tensorboard.\?"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("scalekd.training.trackers.get_available_trackers", lambda: [])
    with pytest.raises(UsageError, match=r"package wandb is not installed; `pip install wandb`"):
        check_trackers(["wandb"])


class Failing(GeneralTracker):
    """Takes three records and no more."""

    name = "failing"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, float]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if len(self.records) == 3:
            raise ConnectionError("the server is gone")
        self.records.append(values)

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_that_fails_does_not_stop_training(
    make_trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path / "run", epochs=2)
    failing = Failing()
    trainer._accelerator.trackers = [failing]
    result = trainer.fit()
    assert result.epochs == 2
    assert [record["samples_viewed"] for record in failing.records] == [16, 32, 48]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("failing: ConnectionError: the server is gone. It receives no") == 1


def test_trackers_are_finished_however_the_run_ends(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", epochs=2, log_interval=100)
    tracker = Failing()
    trainer._accelerator.trackers = [tracker]

    def crash(epoch: int, number: int) -> None:
        if epoch == 1:
            raise RuntimeError("power cut")

    trainer._loader.before_batch = crash
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit()
    assert tracker.finished


def test_settings_are_flat_numbers_and_text(tmp_path: Path) -> None:
    nested = {"lr": 0.1, "freeze": ("a", "b"), "distillation": {"kd": True, "stage3": {"w": None}}}
    assert flat(nested) == {
        "lr": 0.1,
        "freeze": "('a', 'b')",
        "distillation.kd": True,
        "distillation.stage3.w": "None",
    }
    Trackers(Accelerator(cpu=True), tmp_path).start(nested)  # without trackers, nothing
