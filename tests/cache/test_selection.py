"""Parts of a cache: which units, shards and files belong to one, and how two are joined."""

from pathlib import Path

import pytest

from scalekd.cache.selection import (
    Selection,
    commit_selection,
    ranges_of,
    refuse_part,
    selection_path,
    standing_selection,
)
from scalekd.errors import CacheCorrupt, UsageError
from scalekd.storage import LocalStorage

ID = "0" * 64


def part(**changes: object) -> Selection:
    return Selection.model_validate({"cache_id": ID, **changes})


def test_a_part_is_a_product() -> None:
    some = part(passes=[[0, 1]], shards=[[3, 5]], targets=["logits"])
    assert some.has_unit("samples")
    assert [some.has_unit(number) for number in (0, 1, 2)] == [True, True, False]
    assert [some.has_shard(number) for number in (2, 3, 5, 6)] == [False, True, True, False]
    assert some.has_file("passes/0001/logits/values/c/0/0")
    assert not some.has_file("passes/0002/logits/values/c/0/0")
    assert not some.has_file("passes/0001/stage4/codes/c/0/0/0")
    assert some.has_file("passes/0001/view/crop/c/0/0")
    assert some.has_file("samples/key/c/0/0")
    assert not some.has_tail
    assert part(targets=["stage4"]).has_tail
    assert str(some) == "passes 0-1, shards 3-5, targets logits"


def test_joined_parts_include_both() -> None:
    joined = part(passes=[[0, 1]], targets=["logits"]).joined(
        part(passes=[[2, 2], [7, 9]], targets=["stage4"])
    )
    assert joined == part(passes=[[0, 2], [7, 9]], targets=["logits", "stage4"])
    assert joined.joined(part()).is_all


def test_the_last_selection_stands(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert standing_selection(storage) == (0, None)
    assert commit_selection(storage, 1, part(passes=[[0, 0]]))
    assert commit_selection(storage, 2, part(passes=[[0, 1]]))
    assert not commit_selection(storage, 2, part(passes=[[5, 5]]))  # somebody was first
    assert standing_selection(storage) == (2, part(passes=[[0, 1]]))
    with pytest.raises(UsageError, match="passes 0-1"):
        refuse_part(storage, "merged")
    commit_selection(storage, 3, part())
    refuse_part(storage, "merged")


def test_a_damaged_selection_is_an_error(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    commit_selection(storage, 1, part(passes=[[0, 1]]))
    path = tmp_path / selection_path(1)
    path.write_text(path.read_text()[:-2])
    with pytest.raises(CacheCorrupt, match=r"000001\.json"):
        standing_selection(storage)


def test_runs_of_numbers() -> None:
    assert ranges_of([5, 3, 4, 9]) == ((3, 5), (9, 9))
