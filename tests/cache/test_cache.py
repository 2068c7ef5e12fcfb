"""``Cache``: a cache at a location, complete or begun."""

import shutil
from pathlib import Path

import pytest

from scalekd.cache import ChosenTargets, open_cache
from scalekd.cache.cache import Cache
from scalekd.cache.documents.selection import Selection, selection_lock, write_selection
from scalekd.cache.files import digest
from scalekd.cache.forms import ZARR, TarForm
from scalekd.cache.layout import ShardId
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError, UsageError


def test_a_complete_cache_and_one_that_is_begun_are_opened_alike(cache_copy: Path) -> None:
    complete = Cache.open(cache_copy)
    assert complete.manifest() == open_cache(cache_copy).manifest
    assert list(complete.shards(1)) == [
        ShardId(unit, number) for unit in ("samples", 0) for number in range(3)
    ]
    assert complete.missing(complete.shards(3)) == [ShardId(2, number) for number in range(3)]
    (cache_copy / "manifest.json").unlink()
    begun = Cache.open(cache_copy)
    assert begun.plan == complete.plan
    assert begun.manifest() is None
    assert begun.selection.is_all
    assert begun.form == ZARR


def test_a_record_is_read_with_the_files_of_its_shard(cache_copy: Path) -> None:
    cache, shard = Cache.open(cache_copy), ShardId(1, 2)
    record = cache.record(shard)
    assert set(record.files) == set(cache.files(shard))
    assert all(cache.holds(path, expected) for path, expected in record.files.items())
    path = next(iter(record.files))
    content = (cache_copy / path).read_bytes()
    assert cache.holds(path, content)
    (cache_copy / path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not cache.holds(path, record.files[path])
    (cache_copy / path).unlink()
    assert not cache.holds(path, record.files[path])
    assert not cache.holds("../outside", digest(b""))
    with pytest.raises(CacheCorrupt, match="missing"):
        cache.record(ShardId(2, 0))


@pytest.mark.parametrize("name", ["transform", "float16", "int8"])
def test_files_are_listed_without_codec_tables(name: str, tmp_path: Path) -> None:
    """The tables decide how many coefficients a view has, not how many files there are."""
    root = tmp_path / "cache"
    shutil.copytree(Path(__file__).parent / "frozen" / "format1" / name, root)
    for path in (root / "tables").glob("stage*.safetensors"):
        path.unlink()
    cache = Cache.open(root)
    manifest = cache.manifest()
    assert manifest is not None
    cache.check_names(manifest)
    for shard in cache.shards(manifest.num_passes):
        assert set(cache.record(shard).files) <= set(cache.files(shard))


def test_a_manifest_of_another_cache_is_named(cache_copy: Path) -> None:
    cache = Cache.open(cache_copy)
    other = cache.plan.model_copy(update={"cache_id": "0" * 64})
    with pytest.raises(CacheMismatch, match="files of two caches were mixed"):
        Cache(cache_copy, other).manifest()


def test_opening_a_folder_without_a_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no cache"):
        Cache.open(tmp_path / "nowhere")


def test_a_later_plan_does_not_replace_the_first(cache_copy: Path, tmp_path: Path) -> None:
    plan = Cache.open(cache_copy).plan
    later = plan.model_copy(
        update={"provenance": plan.provenance.model_copy(update={"note": "later"})}
    )
    assert Cache.begin(tmp_path / "new", plan, ZARR).plan == plan
    assert Cache.begin(tmp_path / "new", later, ZARR).plan == plan
    with pytest.raises(CacheMismatch, match="Zarr form"):
        Cache.begin(tmp_path / "new", plan, TarForm("none"))


def test_a_part_without_passes_is_not_trained_on(cache_copy: Path) -> None:
    cache = Cache.open(cache_copy)
    selection = Selection(cache_id=cache.plan.cache_id, passes=((7, 9),))
    with selection_lock(cache.storage, create=True):
        write_selection(cache.storage, selection)
    with pytest.raises(UsageError, match=r"contains no pass of the cache \(only passes 7-9"):
        ChosenTargets.open(cache_copy)


def test_a_part_without_shards_has_no_samples(cache_copy: Path) -> None:
    cache = Cache.open(cache_copy)
    selection = Selection(cache_id=cache.plan.cache_id, shards=((900, 901),))
    with selection_lock(cache.storage, create=True):
        write_selection(cache.storage, selection)
    with pytest.raises(CacheCorrupt, match=r"part \(shards 900-901\) without a shard of the cache"):
        _ = open_cache(cache_copy).samples


def test_a_shard_id_has_a_readable_text() -> None:
    assert str(ShardId("samples", 3)) == "shard 3 of the samples"
    assert str(ShardId(1, 3)) == "shard 3 of pass 1"
    assert ShardId(1, 3).record_path == "records/0001/000003.json"
    assert ShardId("samples", 3).lease_path == "records/samples/000003.lease"
