"""Selections: their units, shards and files, and the union of two."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scalekd.cache.documents import canonical
from scalekd.cache.documents.selection import (
    Selection,
    ranges_of,
    read_selection,
    refuse_part,
    selection_lock,
    selection_path,
    write_selection,
)
from scalekd.errors import CacheCorrupt, UsageError
from scalekd.storage import LocalStorage

ID = "0" * 64


def part(**changes: object) -> Selection:
    return Selection.model_validate({"cache_id": ID, **changes})


def test_a_part_is_the_product_of_passes_shards_and_targets() -> None:
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


def test_a_selection_is_one_document_that_is_replaced(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert read_selection(storage) is None
    write_selection(storage, part(passes=[[0, 0]]))
    write_selection(storage, part(passes=[[0, 1]]))
    assert read_selection(storage) == part(passes=[[0, 1]])
    assert [path.name for path in (tmp_path / "selection").iterdir()] == ["000001.json"]
    with pytest.raises(UsageError, match="passes 0-1"):
        refuse_part(storage, "merged")
    write_selection(storage, part())
    refuse_part(storage, "merged")


def test_numbered_selections_of_earlier_releases_are_read_and_replaced(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for number, passes in ((1, [[0, 0]]), (2, [[0, 1]]), (3, [[0, 4]])):
        storage.commit(selection_path(number), canonical(part(passes=passes)))
    assert read_selection(storage) == part(passes=[[0, 4]])
    write_selection(storage, part(passes=[[0, 9]]))
    assert read_selection(storage) == part(passes=[[0, 9]])
    assert storage.exists(selection_path(3))
    assert not storage.exists(selection_path(4))


def test_a_selection_changes_in_one_process_at_a_time(tmp_path: Path) -> None:
    """Threads with descriptors of their own act as processes: each adds a pass."""
    storage = LocalStorage(tmp_path)
    write_selection(storage, part(passes=[[0, 0]]))

    def widen(number: int) -> None:
        with selection_lock(storage):
            current = read_selection(storage)
            assert current is not None
            time.sleep(0.01)
            write_selection(storage, current.joined(part(passes=[[number, number]])))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(widen, range(1, 9)))
    assert read_selection(storage) == part(passes=[[0, 8]])


def test_locking_a_whole_cache_creates_no_folder(tmp_path: Path) -> None:
    with selection_lock(LocalStorage(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_selection_is_an_error(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    write_selection(storage, part(passes=[[0, 1]]))
    path = tmp_path / selection_path(1)
    path.write_text(path.read_text()[:-2])
    with pytest.raises(CacheCorrupt, match=r"000001\.json"):
        read_selection(storage)


def test_consecutive_numbers_become_ranges() -> None:
    assert ranges_of([5, 3, 4, 9]) == ((3, 5), (9, 9))
