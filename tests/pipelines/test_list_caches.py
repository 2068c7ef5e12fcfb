"""``scalekd cache ls``: every cache below a folder, whole, begun or damaged, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache.reading import reader
from scalekd.errors import DataError
from scalekd.pipelines.list_caches import ListedCache, list_caches


@pytest.fixture
def shelf(sound_cache: Path, make_cache: Callable[..., Any], tmp_path: Path) -> Path:
    """A folder with a complete cache, a begun one, and things that are no caches."""
    root = tmp_path / "shelf"
    shutil.copytree(sound_cache, root / "a/whole")
    make_cache(root / "begun", shards=(0, 0), note="for a friend", licence="mit")
    (root / "site").mkdir()
    (root / "site/manifest.json").write_text('{"name": "a web application"}')
    (root / "records").mkdir()
    return root


def _by_name(found: list[ListedCache]) -> dict[str, ListedCache]:
    return {Path(cache.path).name: cache for cache in found}


def test_complete_and_incomplete_caches_are_distinguished(shelf: Path) -> None:
    found = _by_name(list_caches(shelf))
    assert list(found) == ["whole", "begun"]
    whole, begun = found["whole"], found["begun"]
    assert whole.state == "complete"
    assert (whole.num_passes, whole.num_samples, whole.stages) == (2, 70, ("3", "4"))
    assert (whole.codec, whole.logits) == ("float16", "full")
    assert whole.errors["4"] < 1e-6
    assert whole.total_bytes == reader.read_manifest(shelf / "a/whole").total_bytes
    assert whole.age_seconds is not None
    assert 0 <= whole.age_seconds < 3600
    assert begun.state == "begun"
    assert begun.progress == pytest.approx(2 / 6)  # one of three shards, in both passes
    assert (begun.licence, begun.note) == ("mit", "for a friend")


def test_damaged_caches_are_listed_with_the_reason(shelf: Path) -> None:
    (shelf / "begun/plan.json").write_text("{}")
    (shelf / "a/whole/plan.json").unlink()
    shutil.copytree(shelf / "a/whole", shelf / "lost")
    (shelf / "lost/manifest.json").unlink()
    found = _by_name(list_caches(shelf))
    assert {cache.state for cache in found.values()} == {"damaged"}
    assert "plan.json" in str(found["begun"].problem)
    assert "plan.json" in str(found["whole"].problem)
    assert found["whole"].num_passes is None
    assert "neither" in str(found["lost"].problem)


def test_depth_is_bounded_and_links_are_not_followed(shelf: Path, tmp_path: Path) -> None:
    assert set(_by_name(list_caches(shelf, max_depth=1))) == {"begun"}
    assert set(_by_name(list_caches(shelf / "a/whole", max_depth=0))) == {"whole"}
    (tmp_path / "links").mkdir()
    (tmp_path / "links/note").write_text("no cache")
    (tmp_path / "links/loop").symlink_to(tmp_path)
    (tmp_path / "links/whole").symlink_to(shelf / "a/whole")
    assert list_caches(tmp_path / "links") == []


def test_extensions_are_listed_below_their_cache(shelf: Path) -> None:
    shutil.copytree(shelf / "begun", shelf / "a/whole/extensions/more")
    assert set(_by_name(list_caches(shelf))) == {"whole", "more", "begun"}


def test_a_missing_folder_is_an_error_and_one_without_caches_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist or is empty"):
        list_caches(tmp_path / "missing")
    (tmp_path / "file").write_text("text")
    assert list_caches(tmp_path) == []


def test_no_data_is_read(shelf: Path) -> None:
    """A cache whose chunks are all gone is listed like any other."""
    shutil.rmtree(shelf / "a/whole/passes")
    assert _by_name(list_caches(shelf))["whole"].state == "complete"


def test_the_printed_list(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scalekd.cli.main import main

    main(["cache", "ls", str(shelf)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cache ")
    assert "begun, 33%" in lines[2]
    assert lines[3] == "  note: for a friend"
    main(["cache", "ls", str(shelf), "--json"])
    listed = json.loads(capsys.readouterr().out)["caches"]
    assert [cache["state"] for cache in listed] == ["complete", "begun"]
