"""A shard is written by one process at a time, and by another one when the first has ended."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalekd.cache.layout import ShardId
from scalekd.cache.writing import lease
from scalekd.cache.writing.lease import LeaseHolder, Leases, file_system_time, live_lease

_FORK = multiprocessing.get_context("fork")


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Leases]:
    with Leases(tmp_path) as leases:
        yield leases


def _left_by(path: Path, **changes: object) -> LeaseHolder:
    """A lease as another process left it."""
    holder = LeaseHolder.myself().model_copy(update=changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(holder.model_dump_json())
    return holder


def test_a_second_process_learns_the_holder_and_may_lease_another_shard(
    ours: Leases, tmp_path: Path
) -> None:
    assert ours.acquire(0, 3) is None
    assert ours.acquire(0, 3) is None, "holding it already is no obstacle"
    with Leases(tmp_path) as theirs:
        holder = theirs.acquire(0, 3)
        assert holder is not None
        assert str(holder).startswith(f"process {os.getpid()} of ")
        assert not theirs.holds(0, 3)
        assert theirs.acquire(0, 4) is None
        assert theirs.acquire(1, 3) is None
        assert theirs.acquire("samples", 3) is None
        ours.release(0, 3)
        assert theirs.acquire(0, 3) is None
        assert theirs.holds(0, 3)
    assert not list(tmp_path.rglob("*.lease")), "all are given back at the end"
    assert not list(tmp_path.rglob("*.partial"))


def test_one_of_many_concurrent_attempts_gets_the_lease(tmp_path: Path) -> None:
    """A dead owner's lease, so that all of them take over."""
    for attempt in range(10):
        path = tmp_path / ShardId(attempt, 0).lease_path
        _left_by(path, started="long ago")
        everyone = [Leases(tmp_path) for _ in range(8)]
        got: list[Leases] = []
        start = threading.Barrier(len(everyone))

        def race(
            one: Leases,
            attempt: int = attempt,
            start: threading.Barrier = start,
            got: list[Leases] = got,
        ) -> None:
            start.wait()
            if one.acquire(attempt, 0) is None:
                got.append(one)

        threads = [threading.Thread(target=race, args=(one,)) for one in everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(one.holds(attempt, 0) for one in everyone) == 1
        assert len(got) == 1


def _hold(root: Path, ready: object) -> None:
    Leases(root).acquire(0, 0)
    ready.set()  # type: ignore[attr-defined]
    time.sleep(60)


def test_a_killed_owner_is_replaced_at_once(ours: Leases, tmp_path: Path) -> None:
    ready = _FORK.Event()
    owner = _FORK.Process(target=_hold, args=(tmp_path, ready))
    owner.start()
    try:
        assert ready.wait(10)
        holder = ours.acquire(0, 0)
        assert holder is not None
        assert holder.process == owner.pid
        assert live_lease(tmp_path) == holder
    finally:
        os.kill(owner.pid or 0, signal.SIGKILL)
        os.waitid(os.P_PID, owner.pid or 0, os.WEXITED | os.WNOWAIT)
    # Dead, though nobody has asked after it: a zombie still has its number.
    assert ours.acquire(0, 0) is None
    owner.join()


def test_a_reused_process_number_is_not_the_owner(ours: Leases, tmp_path: Path) -> None:
    _left_by(tmp_path / ShardId(0, 0).lease_path, started="of an earlier process")
    assert ours.acquire(0, 0) is None


@pytest.mark.parametrize("elsewhere", [{"host": "far_away"}, {"namespace": "pid:[1]"}])
def test_a_lease_of_another_machine_expires_by_silence_only(
    elsewhere: dict[str, object], ours: Leases, tmp_path: Path
) -> None:
    path = tmp_path / ShardId(0, 0).lease_path
    left = _left_by(path, process=1 << 30, **elsewhere)
    assert ours.acquire(0, 0) == left
    now = file_system_time(path.parent)
    os.utime(path, (now, now - lease.STALE_SECONDS + 5))
    assert ours.acquire(0, 0) == left
    os.utime(path, (now, now - lease.STALE_SECONDS - 5))
    assert live_lease(tmp_path) is None
    assert ours.acquire(0, 0) is None


def test_the_age_of_a_lease_uses_the_clock_of_the_file_system(
    ours: Leases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is a day ahead takes nothing from others."""
    left = _left_by(tmp_path / ShardId(0, 0).lease_path, host="far_away")
    day_ahead = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: day_ahead)
    assert ours.acquire(0, 0) == left


def test_a_lease_is_touched_while_its_owner_lives(tmp_path: Path) -> None:
    with Leases(tmp_path, beat_seconds=0.02) as leases:
        leases.acquire(0, 0)
        path = tmp_path / ShardId(0, 0).lease_path
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_suspended_process_notices_that_its_lease_was_taken_over(
    ours: Leases, tmp_path: Path
) -> None:
    ours.acquire(0, 0)
    path = tmp_path / ShardId(0, 0).lease_path
    other = _left_by(path, host="far_away", token="0" * 32)
    assert not ours.holds(0, 0)
    ours.release(0, 0)
    assert path.read_text() == other.model_dump_json(), "not ours to remove"


def test_a_late_takeover_does_not_get_the_lease(
    ours: Leases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found stale by us, given back and taken anew by another before we create our file."""
    path = tmp_path / ShardId(0, 0).lease_path
    _left_by(path, started="long ago")
    commit = lease.commit_file

    def late(target: Path, data: bytes, *, exclusive: bool) -> bool:
        monkeypatch.undo()
        path.unlink()
        _left_by(path, host="far_away")
        return commit(target, data, exclusive=exclusive)

    monkeypatch.setattr(lease, "commit_file", late)
    holder = ours.acquire(0, 0)
    assert holder is not None
    assert holder.host == "far_away"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_shard_may_be_taken_over_again_and_again(ours: Leases, tmp_path: Path) -> None:
    """Also by one who held it before."""
    assert ours.acquire(0, 0) is None
    path = tmp_path / ShardId(0, 0).lease_path
    for _ in range(3):
        _, holder = lease._end_of_chain(path)
        assert holder is not None
        _left_by(lease._successor(path, holder), started="long ago")
        assert not ours.holds(0, 0)
        assert ours.acquire(0, 0) is None
        assert ours.holds(0, 0)
    ours.release(0, 0)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 4000, b'{"host": 1}', b"\xff\xfe"])
def test_a_damaged_lease_has_no_owner(content: bytes, ours: Leases, tmp_path: Path) -> None:
    path = tmp_path / ShardId(0, 0).lease_path
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert ours.acquire(0, 0) is None
