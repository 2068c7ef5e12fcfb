"""Tars on stores: written, fetched, joined and read like any cache, a block a request."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.errors import CacheCorrupt, CacheMismatch
from scalekd.images import open_dataset
from scalekd.loading import CachedViewLoader
from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache
from scalekd.pipelines.merge_caches import merge_caches
from scalekd.pipelines.share_cache import ShareConfig, share_cache
from scalekd.storage import open_storage

Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="session")
def view_tars(make_tars: Callable[[str], Path]) -> Path:
    """The sound cache as tars with the rendered views. Read only."""
    return make_tars("view")


def batches(place: Any, images: Any = None) -> list[dict[str, torch.Tensor]]:
    loader = CachedViewLoader(open_cache(place), images, batch_size=10, groups=("stage4", "logits"))
    return list(loader.epoch(0))


def test_students_read_blocks_of_a_web_server_one_request_each(
    web: Any, view_tars: Path, sound_cache: Path, tiny_images: Path
) -> None:
    shutil.copytree(view_tars, web.root / "cache")
    expected = batches(sound_cache, open_dataset(str(tiny_images)))
    found = batches(f"{web.url}/cache")
    for there, here in zip(expected, found, strict=True):
        assert all(torch.equal(there[name], here[name]) for name in there)
    requests = [request for request in web.requests if request.path.endswith(".tar")]
    assert len(requests) == len(open_cache(view_tars).blocks()) == 9
    assert sum(request.num_bytes for request in requests) == sum(
        path.stat().st_size - 1024 for path in view_tars.glob("passes/0000/*.tar")
    )


def test_a_block_damaged_in_transit_is_fetched_again_and_then_refused(
    web: Any, view_tars: Path
) -> None:
    shutil.copytree(view_tars, web.root / "cache")
    web.fail("flip", times=1, path="passes/0000/000000.tar")
    assert len(batches(f"{web.url}/cache")) == 7
    web.fail("flip", times=None, path="passes/0000/000000.tar")
    with pytest.raises(CacheCorrupt, match=r"passes/0000/000000\.tar from byte"):
        batches(f"{web.url}/cache")


def test_stage_one_writes_tars_to_a_bucket_and_they_are_pulled_to_the_byte(
    s3: Any,
    make_cache: Callable[..., Any],
    view_tars: Path,
    tmp_path: Path,
    file_contents: Contents,
) -> None:
    place = f"{s3.bucket}/cache"
    assert make_cache(place, format="webdataset", embed="view").complete
    share_cache(ShareConfig(source=place, target=str(tmp_path / "pulled")))
    assert file_contents(tmp_path / "pulled") == file_contents(view_tars)
    share_cache(ShareConfig(source=str(view_tars), target=f"{s3.bucket}/pushed"))
    assert not verify(open_storage(f"{s3.bucket}/pushed")).problems
    convert_cache(
        ConvertConfig(source=place, output=str(tmp_path / "zarr"), format="zarr", workers=0)
    )
    assert not verify(tmp_path / "zarr").problems


def test_a_cache_of_the_other_form_is_not_mixed_with_it(
    view_tars: Path, sound_cache: Path, tmp_path: Path, file_contents: Contents
) -> None:
    target = Path(shutil.copytree(sound_cache, tmp_path / "cache"))
    with pytest.raises(CacheMismatch, match="was begun in Zarr form"):
        share_cache(ShareConfig(source=str(view_tars), target=str(target)))
    assert file_contents(target) == file_contents(sound_cache)


def test_parts_of_tars_are_merged(
    view_tars: Path, sound_cache: Path, tiny_images: Path, tmp_path: Path, file_contents: Contents
) -> None:
    for name, shards in (("one", (0, 0)), ("two", (1, 2))):
        convert_cache(
            ConvertConfig(
                source=str(sound_cache),
                output=str(tmp_path / name),
                format="webdataset",
                embed="view",
                data_dir=str(tiny_images),
                workers=0,
                shards=shards,
            )
        )
    assert merge_caches([tmp_path / "one", tmp_path / "two"], tmp_path / "both").complete
    assert file_contents(tmp_path / "both") == file_contents(view_tars)
