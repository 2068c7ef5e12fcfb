"""Coding and committing beside the teacher: order, limits and faults, at any timing."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalekd.cache.writing.in_flight import InFlight
from scalekd.cache.writing.shard_writer import OpenBlock, ShardWriter
from scalekd.codecs.plain import Float16Codec
from scalekd.codecs.transform import TransformCodec
from scalekd.errors import DataError, EnvironmentFault
from scalekd.pipelines import _write_shards
from scalekd.pipelines._teacher_stream import TeacherStream

FileContents = Callable[[Path], dict[str, bytes]]
TARGETS = ("passes/", "samples/")


def test_views_wait_for_room_and_errors_end_the_wait() -> None:
    in_flight = InFlight(10)
    in_flight.enter(6)
    entered = threading.Event()

    def more() -> None:
        in_flight.enter(5)
        entered.set()

    thread = threading.Thread(target=more)
    thread.start()
    assert not entered.wait(0.05)
    in_flight.leave(1)
    assert entered.wait(5)
    thread.join()
    threading.Timer(0.05, lambda: in_flight.fail(DataError("damaged"))).start()
    with pytest.raises(DataError, match="damaged"):
        in_flight.enter(1)
    InFlight(10).enter(1000)  # a batch larger than the limit passes when nothing else is in flight


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_bytes_do_not_depend_on_which_task_is_slow(
    make_cache: Callable[..., Any],
    file_contents: FileContents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    make_cache(tmp_path / "quick", format=form)
    random, encode = np.random.default_rng(0), Float16Codec.encode

    def slow(self: Float16Codec, features: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(float(random.uniform(0, 0.01)))
        return encode(self, features)

    monkeypatch.setattr(Float16Codec, "encode", slow)
    monkeypatch.setattr(_write_shards, "_LEAST_TASK_VIEWS", 3)  # 10 views a batch, 8 a block
    make_cache(tmp_path / "slow", format=form)
    assert file_contents(tmp_path / "slow") == file_contents(tmp_path / "quick")


def test_results_read_one_batch_later_are_the_same(
    make_cache: Callable[..., Any],
    sound_cache: Path,
    file_contents: FileContents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an accelerator, where the next batch is started first."""
    monkeypatch.setattr(TeacherStream, "num_behind", 1)
    make_cache(tmp_path / "behind")
    assert file_contents(tmp_path / "behind") == file_contents(sound_cache)


def test_shards_are_written_one_after_the_other(
    make_cache: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a commit takes its time, the next shard is computed, and writes no file."""
    commit, write = ShardWriter.commit, OpenBlock._write
    committing: set[int] = set()
    seen, overlapped = [], threading.Event()

    def slow_commit(self: ShardWriter, skipped: Any) -> None:
        committing.add(id(self))
        if not seen:  # the first: wait until the teacher has been asked for the next shard
            assert overlapped.wait(20)
        time.sleep(0.05)
        commit(self, skipped)
        committing.discard(id(self))
        seen.append(self)

    def watched_write(self: OpenBlock) -> None:
        assert committing <= {id(self._shard)}, "another shard is being committed"
        write(self)

    run = _write_shards.run_teacher

    def watched_run(*args: Any) -> Any:
        if committing:
            overlapped.set()
        return run(*args)

    monkeypatch.setattr(ShardWriter, "commit", slow_commit)
    monkeypatch.setattr(OpenBlock, "_write", watched_write)
    monkeypatch.setattr(_write_shards, "run_teacher", watched_run)
    result = make_cache(tmp_path / "cache")
    assert result.complete
    assert len(seen) == result.num_shards * 2


def test_an_error_in_a_coding_thread_stops_the_run(
    make_cache: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _write_shards.run_teacher
    calls: list[int] = []

    def broken(*args: Any) -> Any:
        output = run(*args)
        calls.append(1)
        if len(calls) == 4:
            output.features[4][2, 0, 0] = np.nan
        return output

    monkeypatch.setattr(_write_shards, "run_teacher", broken)
    with pytest.raises(DataError, match=r"pass 0, shard \d, views of samples .* to .*: .*nan"):
        make_cache(tmp_path / "cache")
    assert len(calls) < 14  # the run ended long before its last batch
    assert not list(tmp_path.rglob("*.lease"))
    monkeypatch.undo()
    assert make_cache(tmp_path / "cache").complete


def test_an_error_in_a_background_commit_stops_the_run(
    make_cache: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = ShardWriter.commit
    num_commits = 0

    def full(self: ShardWriter, skipped: Any) -> None:
        nonlocal num_commits
        num_commits += 1
        if num_commits == 2:
            raise EnvironmentFault("the disk is full")
        commit(self, skipped)

    monkeypatch.setattr(ShardWriter, "commit", full)
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        make_cache(tmp_path / "cache")
    assert num_commits <= 3
    assert len(list(tmp_path.glob("cache/records/0*/*.json"))) == 1
    monkeypatch.undo()
    assert make_cache(tmp_path / "cache").complete


def test_a_coding_task_is_a_multiple_of_the_codecs_step(
    make_cache: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of another number of rows may round otherwise."""
    sizes: list[int] = []
    encode = TransformCodec.encode

    def noted(self: TransformCodec, features: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(features))
        return encode(self, features)

    make_cache(tmp_path / "cache", codec="transform:error=0.05", passes=1)
    (tmp_path / "cache" / "manifest.json").unlink()
    monkeypatch.setattr(TransformCodec, "encode", noted)
    monkeypatch.setattr(TransformCodec, "views_at_once", 3)
    monkeypatch.setattr(_write_shards, "_LEAST_TASK_VIEWS", 5)
    make_cache(tmp_path / "cache", codec="transform:error=0.05", passes=2)
    assert set(sizes) <= {6, 4, 2}  # of batches of 10, and of shorter ones at a shard's end
    assert 6 in sizes


def test_the_device_encoder_writes_what_the_host_writes(
    make_cache: Callable[..., Any],
    file_contents: FileContents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {"codec": "transform:error=0.05", "passes": 1}
    make_cache(tmp_path / "host", **settings)
    monkeypatch.setattr(_write_shards, "default_encoder", lambda device: "torch")
    make_cache(tmp_path / "device", **settings)
    host, device = (file_contents(tmp_path / name) for name in ("host", "device"))
    assert host.keys() == device.keys()
    different = [
        path
        for path in host
        if path.startswith(TARGETS) and host[path] != device[path] and "coefficients" not in path
    ]
    assert different == []


def test_features_that_are_not_finite_are_named_by_the_device_encoder(
    make_cache: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"codec": "transform:error=0.05", "passes": 1}
    monkeypatch.setattr(_write_shards, "default_encoder", lambda device: "torch")
    run = _write_shards.run_teacher

    def broken(*args: Any) -> Any:
        output = run(*args)
        output.features[3][5, 1, 0] = np.inf
        return output

    monkeypatch.setattr(_write_shards, "run_teacher", broken)
    with pytest.raises(DataError, match=r"pass 0, shard 0, .*features of view 5 .* at token 1"):
        make_cache(tmp_path / "cache", **settings)
