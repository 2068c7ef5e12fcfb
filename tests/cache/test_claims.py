"""Shards and their claims, as the writer uses them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache.layout import lease_path
from scalekd.cache.lease import LeaseHolder, Leases
from scalekd.cache.planning import read_plan
from scalekd.cache.targets import CacheCodecs
from scalekd.cache.writer import CacheWriter
from scalekd.errors import CacheMismatch, EnvironmentFault, UsageError

FileContents = Callable[[Path], dict[str, bytes]]
LOST = "records/0001/000002.json"


def _writer(root: Path) -> CacheWriter:
    plan = read_plan(root)
    assert plan is not None
    return CacheWriter(root, plan, CacheCodecs.load(root, plan.identity).layout(plan.identity))


def _somebody_elses(path: Path) -> LeaseHolder:
    holder = LeaseHolder.myself().model_copy(update={"host": "far_away", "process": 7})
    path.write_text(holder.model_dump_json())
    return holder


def test_a_shard_committed_while_it_is_claimed_is_not_claimed(
    cache_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (cache_copy / LOST).read_bytes()
    (cache_copy / LOST).unlink()
    with _writer(cache_copy) as writer:
        assert writer.claim(1, 2)
        writer.leases.release(1, 2)
        acquire = writer.leases.acquire

        def late(unit: Any, shard: int) -> Any:
            (cache_copy / LOST).write_bytes(content)
            return acquire(unit, shard)

        monkeypatch.setattr(writer.leases, "acquire", late)
        assert not writer.claim(1, 2)
        assert not writer.busy
    assert not list(cache_copy.rglob("*.lease"))


def test_a_shard_of_somebody_else_is_not_begun(cache_copy: Path) -> None:
    (cache_copy / LOST).unlink()
    holder = _somebody_elses(cache_copy / lease_path(1, 2))
    with _writer(cache_copy) as writer:
        assert not writer.claim(1, 2)
        assert writer.busy == {(1, 2): holder}
        with pytest.raises(CacheMismatch, match="is being written by process 7 of far_away"):
            writer.shard(1, 2)
        with pytest.raises(CacheMismatch, match="is already committed"):
            writer.shard(1, 1)


def test_a_job_that_finds_all_taken_says_by_whom(cache_copy: Path, make_cache: Any) -> None:
    (cache_copy / LOST).unlink()
    (cache_copy / "manifest.json").unlink()
    _somebody_elses(cache_copy / lease_path(1, 2))
    result = make_cache(cache_copy)
    assert (result.complete, result.shards_written) == (False, 0)
    assert result.shards_elsewhere == ("shard 2 of pass 1: process 7 of far_away",)
    with pytest.raises(UsageError, match=r"--overwrite.*being written by process 7 of far_away"):
        make_cache(cache_copy, overwrite=True)


def test_an_extension_that_is_being_written_is_not_overwritten(
    cache_copy: Path, make_cache: Any, file_contents: FileContents
) -> None:
    extension = cache_copy / "extensions/other"
    shutil.copytree(cache_copy, extension)
    _somebody_elses(extension / lease_path(1, 2))
    before = file_contents(cache_copy)
    with pytest.raises(UsageError, match=r"--overwrite.*being written by process 7 of far_away"):
        make_cache(cache_copy, overwrite=True)
    assert file_contents(cache_copy) == before


def test_who_stood_still_commits_nothing(
    cache_copy: Path,
    sound_cache: Path,
    make_cache: Any,
    file_contents: FileContents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (cache_copy / LOST).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "holds", lambda *_: False)
        with pytest.raises(EnvironmentFault, match="stood still for so long"):
            make_cache(cache_copy)
    assert not (cache_copy / LOST).exists()
    make_cache(cache_copy)
    assert file_contents(cache_copy) == file_contents(sound_cache)
