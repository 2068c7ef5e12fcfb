"""Joining parts: the result is the cache that one machine would have written, or a refusal."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache.care.verify import verify
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError, UsageError
from scalekd.pipelines.merge_caches import merge_caches

Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def parts(make_cache: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """Shards 0-1 of one pass here, shards 1-2 of two passes there."""
    make_cache(tmp_path / "here", passes=1, shards=(0, 1))
    make_cache(tmp_path / "there", passes=2, shards=(1, 2))
    return tmp_path / "here", tmp_path / "there"


def test_parts_make_the_cache_that_one_machine_writes(
    parts: tuple[Path, Path], make_cache: Any, tmp_path: Path, file_contents: Contents
) -> None:
    before = [file_contents(part) for part in parts]
    output = tmp_path / "joined"
    joined = merge_caches(parts, output)
    assert (joined.complete, joined.num_passes) == (True, 1)
    assert joined.missing == ("pass 1: 0",)
    assert verify(output).problems == []
    make_cache(parts[0], passes=2, shards=(0, 0))
    again = merge_caches(parts, output)
    assert (again.num_passes, again.missing) == (2, ())
    make_cache(tmp_path / "alone", passes=2)
    assert file_contents(output) == file_contents(tmp_path / "alone")
    for part, was in zip(parts, before, strict=True):
        assert was.items() <= file_contents(part).items()
    idle = merge_caches(parts, output)
    assert (idle.num_files, idle.num_found) == (0, 11)


def test_files_are_linked_unless_copies_are_wanted(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    chunk = "passes/0000/stage4/values/c/0/0/0"
    merge_caches(parts, tmp_path / "linked")
    merge_caches(parts, tmp_path / "copied", copy=True)
    assert (tmp_path / "linked" / chunk).samefile(parts[0] / chunk)
    assert not (tmp_path / "copied" / chunk).samefile(parts[0] / chunk)


def test_complete_caches_merge_with_parts_of_more_passes(
    sound_cache: Path, make_cache: Any, tmp_path: Path
) -> None:
    make_cache(tmp_path / "more", passes=3)
    shutil.rmtree(tmp_path / "more/records/0000")
    result = merge_caches([sound_cache, tmp_path / "more"], tmp_path / "joined")
    assert (result.num_passes, result.missing) == (3, ())


def test_other_caches_are_refused_with_the_difference(
    sound_cache: Path, make_cache: Any, tmp_path: Path
) -> None:
    make_cache(tmp_path / "other", passes=1, seed=5)
    with pytest.raises(CacheMismatch, match=r"views\.seed is 0 in the cache, 5 here"):
        merge_caches([sound_cache, tmp_path / "other"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_other_licences_are_refused(make_cache: Any, tmp_path: Path) -> None:
    make_cache(tmp_path / "free", passes=1, licence="mit")
    make_cache(tmp_path / "bound", passes=1, licence="cc-by-nc-4.0")
    with pytest.raises(CacheMismatch, match="licence"):
        merge_caches([tmp_path / "free", tmp_path / "bound"], tmp_path / "joined")


def test_one_shard_with_two_contents_is_refused_before_anything_is_written(
    sound_cache: Path, cache_copy: Path, tmp_path: Path
) -> None:
    record = cache_copy / "records/0001/000002.json"
    text = record.read_text()
    first = text.index('"sha256": "') + 11
    digit = "0" if text[first] != "0" else "1"
    record.write_text(text[:first] + digit + text[first + 1 :])
    with pytest.raises(CacheMismatch, match="shard 2 of pass 1 has different bytes"):
        merge_caches([sound_cache, cache_copy], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("copy", [True, False])
def test_a_damaged_file_is_not_passed_on(
    cache_copy: Path, sound_cache: Path, tmp_path: Path, copy: bool
) -> None:
    chunk = cache_copy / "passes/0000/stage4/values/c/3/0/0"
    content = bytearray(chunk.read_bytes())
    content[30] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CacheCorrupt, match=r"stage4/values/c/3/0/0"):
        merge_caches([cache_copy], tmp_path / "joined", copy=copy)
    assert not (tmp_path / "joined/records/0000/000001.json").exists()
    assert merge_caches([sound_cache], tmp_path / "joined").complete


@pytest.mark.parametrize("copy", [False, True])
def test_a_file_that_is_missing_is_damage(
    copy: bool, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    (parts[0] / "passes/0000/pixel_hash/c/0").unlink()
    with pytest.raises(CacheCorrupt, match="pixel_hash/c/0: "):
        merge_caches(parts, tmp_path / "joined", copy=copy)


def test_impossible_merges_are_refused(sound_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        merge_caches([sound_cache, tmp_path / "nothing"], tmp_path / "joined")
    with pytest.raises(UsageError, match="must be different folders"):
        merge_caches([sound_cache], sound_cache)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not part of a cache"):
        merge_caches([sound_cache], tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
