"""The writer and the leases of shards."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache.cache import Cache
from scalekd.cache.documents.manifest import ShardRecord
from scalekd.cache.layout import ShardId
from scalekd.cache.writing.lease import LeaseHolder, Leases
from scalekd.cache.writing.writer import CacheWriter
from scalekd.errors import CacheMismatch, EnvironmentFault, UsageError

FileContents = Callable[[Path], dict[str, bytes]]
LOST = "records/0001/000002.json"


def _writer(root: Path) -> CacheWriter:
    return CacheWriter(Cache.open(root))


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


def test_a_shard_leased_by_another_process_is_not_begun(cache_copy: Path) -> None:
    (cache_copy / LOST).unlink()
    holder = _somebody_elses(cache_copy / ShardId(1, 2).lease_path)
    with _writer(cache_copy) as writer:
        assert not writer.claim(1, 2)
        assert writer.busy == {(1, 2): holder}
        with pytest.raises(CacheMismatch, match="is being written by process 7 of far_away"):
            writer.shard(1, 2)
        with pytest.raises(CacheMismatch, match="is already committed"):
            writer.shard(1, 1)


def test_a_job_without_free_shards_names_the_process_that_writes_them(
    cache_copy: Path, make_cache: Any
) -> None:
    (cache_copy / LOST).unlink()
    (cache_copy / "manifest.json").unlink()
    _somebody_elses(cache_copy / ShardId(1, 2).lease_path)
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
    _somebody_elses(extension / ShardId(1, 2).lease_path)
    before = file_contents(cache_copy)
    with pytest.raises(UsageError, match=r"--overwrite.*being written by process 7 of far_away"):
        make_cache(cache_copy, overwrite=True)
    assert file_contents(cache_copy) == before


def test_a_suspended_process_commits_nothing(
    cache_copy: Path,
    sound_cache: Path,
    make_cache: Any,
    file_contents: FileContents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (cache_copy / LOST).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "holds", lambda *_: False)
        with pytest.raises(EnvironmentFault, match="was suspended for so long"):
            make_cache(cache_copy)
    assert not (cache_copy / LOST).exists()
    make_cache(cache_copy)
    assert file_contents(cache_copy) == file_contents(sound_cache)


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def whole(
    request: pytest.FixtureRequest,
    make_cache: Any,
    sound_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A complete cache of each form."""
    if request.param == "zarr":
        return sound_cache
    root = tmp_path_factory.mktemp("tars") / "cache"
    assert make_cache(root, format="webdataset", embed="view").complete
    return root


@pytest.mark.parametrize("unit", ["samples", 1])
@pytest.mark.parametrize("record", [True, False])
def test_files_of_a_shard_that_was_taken_over_are_not_deleted(
    unit: str | int, record: bool, whole: Path, tmp_path: Path, file_contents: FileContents
) -> None:
    """``record``: the shard was committed since; otherwise another process writes it now."""
    root = Path(shutil.copytree(whole, tmp_path / "cache"))
    committed = root / ShardId(unit, 2).record_path
    content = committed.read_bytes()
    committed.unlink()
    with _writer(root) as writer:
        assert writer.claim(unit, 2)
        if record:
            committed.write_bytes(content)
        else:
            _somebody_elses(root / ShardId(unit, 2).lease_path)
        before = file_contents(root)
        for relative in ShardRecord.model_validate_json(content).files:
            with pytest.raises(EnvironmentFault, match="was suspended for so long"):
                writer.store.put(relative, b"other bytes")
        with pytest.raises(EnvironmentFault, match="was suspended for so long"):
            writer.remove_debris(unit, 2)
        assert file_contents(root) == before


def test_a_file_that_appears_at_the_last_moment_is_kept(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process commits between the check of the lease and the rename."""
    root = Path(shutil.copytree(whole, tmp_path / "cache"))
    committed = root / ShardId(1, 2).record_path
    content = committed.read_bytes()
    files = ShardRecord.model_validate_json(content).files
    relative = next(iter(files))
    theirs = (root / relative).read_bytes()
    committed.unlink()
    with _writer(root) as writer:
        assert writer.claim(1, 2)
        writer.remove_debris(1, 2)
        look = writer.check_claim

        def stand_still(unit: Any, shard: int) -> None:
            look(unit, shard)
            if not committed.exists():
                (root / relative).write_bytes(theirs)
                committed.write_bytes(content)

        monkeypatch.setattr(writer, "check_claim", stand_still)
        with pytest.raises(EnvironmentFault, match="was suspended for so long"):
            writer.store.put(relative, b"other bytes")
    assert (root / relative).read_bytes() == theirs


def test_the_owner_of_a_lease_replaces_files_left_by_another_process(
    whole: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "cache"))
    record = root / ShardId(1, 2).record_path
    relative = next(iter(ShardRecord.model_validate_json(record.read_bytes()).files))
    record.unlink()
    with _writer(root) as writer:
        assert writer.claim(1, 2)
        writer.store.put(relative, b"mine")
    assert (root / relative).read_bytes() == b"mine"
