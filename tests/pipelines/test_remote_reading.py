"""Caches and images on stores: the same batches and the same student as from a local disk."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from scalekd.cache import open_cache
from scalekd.cli.cache_commands import info as info_command
from scalekd.errors import CacheCorrupt, DataError, EnvironmentFault, UsageError
from scalekd.images import open_dataset
from scalekd.loading import CachedViewLoader
from scalekd.pipelines.inspect_cache import cache_info, verify_cache
from scalekd.pipelines.train_student import train_student
from scalekd.storage import LocalCache, open_storage
from scalekd.training import TrainConfig
from scalekd.training.checkpoint import STUDENT_FILE

Upload = Callable[[Path, str], None]


@pytest.fixture
def on_s3(s3: Any, upload: Upload, sound_cache: Path, tiny_images: Path) -> Any:
    """The cache at ``…/cache`` and its images at ``…/images``."""
    upload(sound_cache, f"{s3.bucket}/cache")
    upload(tiny_images, f"{s3.bucket}/images")
    s3.reset()
    return s3


@pytest.fixture
def on_web(web: Any, sound_cache: Path, tiny_images: Path) -> Any:
    shutil.copytree(sound_cache, web.root / "cache")
    shutil.copytree(tiny_images, web.root / "images")
    return web


def batches(
    cache: Any, images: Any, *, epochs: int = 1, num_workers: int = 0
) -> list[dict[str, torch.Tensor]]:
    loader = CachedViewLoader(
        open_cache(cache),
        images,
        batch_size=10,
        groups=("stage4", "logits"),
        num_workers=num_workers,
    )
    return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_batches_from_a_bucket_are_those_from_the_disk(
    on_s3: Any, sound_cache: Path, tiny_images: Path
) -> None:
    images = open_dataset(f"{on_s3.bucket}/images")
    assert_same(
        batches(f"{on_s3.bucket}/cache", images, epochs=2),
        batches(sound_cache, open_dataset(str(tiny_images)), epochs=2),
    )


@pytest.mark.slow
def test_worker_processes_read_from_a_bucket(
    on_s3: Any, sound_cache: Path, tiny_images: Path
) -> None:
    images = open_dataset(f"{on_s3.bucket}/images")
    assert_same(
        batches(f"{on_s3.bucket}/cache", images, num_workers=2),
        batches(sound_cache, open_dataset(str(tiny_images))),
    )


def test_a_second_reading_fetches_only_files_that_may_have_changed(
    on_s3: Any, tmp_path: Path
) -> None:
    local_cache = LocalCache(tmp_path / "copies", 10**9)

    def read() -> list[dict[str, torch.Tensor]]:
        return batches(
            open_storage(f"{on_s3.bucket}/cache", local_cache=local_cache),
            open_dataset(f"{on_s3.bucket}/images", local_cache=local_cache),
            epochs=2,
        )

    first = read()
    fetched = [r.path for r in on_s3.requests if r.method == "GET" and "list-type" not in r.query]
    assert len(fetched) == len(set(fetched)), "a file was fetched twice"
    on_s3.reset()
    assert_same(read(), first)
    given = {r.path.split("/", 2)[-1] for r in on_s3.requests if r.status == 200 and r.num_bytes}
    shards_listing = on_s3.bucket.removeprefix("s3://")
    assert given <= {shards_listing, "cache/manifest.json", "images/classes.txt"}


def test_every_file_of_an_epoch_is_one_request(on_s3: Any) -> None:
    reader = open_cache(f"{on_s3.bucket}/cache")
    on_s3.reset()
    for first, count in reader.blocks():
        reader.read_rows(0, first, count, ["stage4/values", "logits/values", "pixel_hash"])
    paths = [request.path for request in on_s3.requests]
    assert len(paths) == len(set(paths))
    chunks = [path for path in paths if "/c/" in path and "/passes/" in path]
    blocks, shards = len(reader.blocks()), reader.identity.num_shards
    assert len(chunks) == 2 * blocks + shards


def test_a_shard_of_images_is_indexed_in_one_request(on_s3: Any) -> None:
    images = open_dataset(f"{on_s3.bucket}/images")
    assert len(images) == 70
    assert on_s3.count("GET", "train-000000.tar") == 1
    assert images.class_names is not None


def test_neighbours_in_a_shard_come_in_one_request(on_s3: Any, tiny_images: Path) -> None:
    images, local = open_dataset(f"{on_s3.bucket}/images"), open_dataset(str(tiny_images))
    on_s3.reset()
    assert list(images.read_many(range(30, 50))) == list(local.read_many(range(30, 50)))
    assert on_s3.count() == 2  # the shard ends at 40
    on_s3.reset()
    scattered = [3, 60, 2, 2, 41]
    assert list(images.read_many(scattered)) == [local[index] for index in scattered]
    assert on_s3.count() == len(scattered)


@pytest.mark.parametrize(
    ("data_dir", "split"),
    [
        ("images", "train"),
        ("images", "train-*.tar"),
        ("images", "train-{000000..000001}.tar"),
        ("images/train-*.tar", "train"),
        ("images/train-{000000,000001}.tar", "train"),
    ],
)
def test_shards_can_be_named_by_split_glob_and_braces(
    on_s3: Any, tiny_images: Path, data_dir: str, split: str
) -> None:
    found = open_dataset(f"{on_s3.bucket}/{data_dir}", split)
    local = open_dataset(str(tiny_images))
    assert found.fingerprint == local.fingerprint
    assert found.class_names == local.class_names
    assert found[7] == local[7]


def test_shards_on_a_web_server_must_be_named(on_web: Any, tiny_images: Path) -> None:
    found = open_dataset(f"{on_web.url}/images", "train-{000000..000001}.tar")
    assert found.fingerprint == open_dataset(str(tiny_images)).fingerprint
    with pytest.raises(UsageError, match=r"cannot list its files.*--split 'train-\{000000"):
        open_dataset(f"{on_web.url}/images")
    with pytest.raises(DataError, match=r"no file matches .*/train-000002\.tar"):
        open_dataset(f"{on_web.url}/images", "train-{000000..000002}.tar")


def test_a_folder_of_classes_in_a_bucket_is_read(
    s3: Any, upload: Upload, tmp_path: Path, image_bytes: dict[int, bytes]
) -> None:
    for number in range(12):
        path = tmp_path / f"set/train/class-{number % 3}/deep/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes[number])
    for name in (
        "class-0/notes.txt",
        "class-0/._0.jpg",
        "class-0/jpg",
        ".ipynb_checkpoints/0-checkpoint.jpg",
        "a-class-without-images/._0.jpg",
    ):
        (tmp_path / "set/train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set/train" / name).write_text("x")
    upload(tmp_path / "set", f"{s3.bucket}/set")
    found, local = open_dataset(f"{s3.bucket}/set"), open_dataset(str(tmp_path / "set"))
    assert found.fingerprint == local.fingerprint
    assert found.class_names == local.class_names == ("class-0", "class-1", "class-2")
    assert [found[i] for i in range(12)] == [local[i] for i in range(12)]


def test_remote_shards_without_labels_keep_their_order(
    s3: Any, upload: Upload, tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    """So that reading stays sequential; nothing shows whether they are shuffled."""
    members = {f"{number:04d}.jpg": b"%d" % number for number in range(600)}
    write_tar(tmp_path / "set/train-0.tar", members)
    upload(tmp_path / "set", f"{s3.bucket}/unlabelled")
    found, local = open_dataset(f"{s3.bucket}/unlabelled"), open_dataset(str(tmp_path / "set"))
    assert [found.key(index) for index in range(3)] == ["0000", "0001", "0002"]
    assert (found.labels == -1).all()
    assert found.keys.tolist() == local.stored_order().keys.tolist()
    assert found[7].image == b"7"


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("val", "neither val-.*it has classes.txt, train-000000.tar"),
        ("x*.tar", "no file matches"),
    ],
)
def test_missing_images_are_named(on_s3: Any, split: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_dataset(f"{on_s3.bucket}/images", split)


def test_a_damaged_shard_is_named(on_s3: Any, tiny_images: Path) -> None:
    whole = (tiny_images / "train-000001.tar").read_bytes()
    storage = open_storage(f"{on_s3.bucket}/images")
    for content in (whole[: len(whole) // 2], whole[: len(whole) // 2 // 512 * 512], b"x" * 5000):
        storage.commit("train-000001.tar", content)
        with pytest.raises(DataError, match=r"s3://.*/images/train-000001\.tar"):
            open_dataset(f"{on_s3.bucket}/images")


def student_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / STUDENT_FILE)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    def run(name: str, **places: Any) -> dict[str, torch.Tensor]:
        options = {
            "model": "test_resnet",
            "val_split": None,
            "epochs": 2,
            "batch_size": 16,
            "workers": 0,
            "amp": "no",
            "output": str(tmp_path / name),
            **places,
        }
        train_student(TrainConfig.from_mapping(options))
        return student_of(tmp_path / name)

    return run


def test_a_student_does_not_depend_on_the_location_of_cache_and_images(
    on_s3: Any,
    on_web: Any,
    sound_cache: Path,
    tiny_images: Path,
    tmp_path: Path,
    train: Callable[..., dict[str, torch.Tensor]],
) -> None:
    local = train("local", cache=str(sound_cache), data_dir=str(tiny_images))
    remote = train("s3", cache=f"{on_s3.bucket}/cache", data_dir=f"{on_s3.bucket}/images")
    kept = train(
        "kept",
        cache=f"{on_web.url}/cache",
        data_dir=f"{on_web.url}/images/train-{{000000..000001}}.tar",
        local_cache=str(tmp_path / "copies"),
        local_cache_size="1GB",
    )
    for other in (remote, kept):
        assert all(torch.equal(local[name], other[name]) for name in local)


def test_a_student_does_not_depend_on_faults_of_the_store(
    on_s3: Any,
    sound_cache: Path,
    tiny_images: Path,
    train: Callable[..., dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datetime import timedelta

    from scalekd.storage import objects

    quick = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20)}
    monkeypatch.setitem(objects._RETRIES, "backoff", {**quick, "base": 2})
    places = {"cache": f"{on_s3.bucket}/cache", "data_dir": f"{on_s3.bucket}/images"}
    local = train("local", cache=str(sound_cache), data_dir=str(tiny_images))
    on_s3.fail("status", status=503, times=3, path="stage4")
    on_s3.fail("drop", times=3, path="logits")
    on_s3.fail("flip", times=1, path="pixel_hash/c/0")
    on_s3.fail("short", times=1, path="pixel_hash/c/1")
    on_s3.fail("status", status=500, times=3, path=".tar")
    stumbled = train("stumbled", **places)
    assert not any(fault.times for fault in on_s3.faults)
    assert all(torch.equal(local[name], stumbled[name]) for name in local)
    on_s3.fail("status", status=400, body=b"<Error><Code>ExpiredToken</Code></Error>", times=None)
    with pytest.raises(EnvironmentFault, match="refuses the credentials"):
        train("expired", **places)


def test_verify_info_and_doctor_accept_a_url(on_s3: Any, sound_cache: Path) -> None:
    place = f"{on_s3.bucket}/cache"
    found, local = verify_cache(place), verify_cache(sound_cache)
    assert found.problems == ()
    assert (found.num_files, found.num_bytes) == (local.num_files, local.num_bytes)
    assert cache_info(place).model_dump(exclude={"path"}) == cache_info(sound_cache).model_dump(
        exclude={"path"}
    )
    result = CliRunner().invoke(info_command, [place])
    assert result.exit_code == 0
    assert place in result.output


@pytest.mark.parametrize("quick", [False, True])
def test_verify_names_damaged_files_in_a_bucket(on_s3: Any, quick: bool) -> None:
    storage = open_storage(f"{on_s3.bucket}/cache")
    gone, cut, flipped = (f"passes/0001/logits/values/c/{n}/0" for n in range(3))
    storage.delete(gone)
    content = storage.read(cut, max_bytes=10**6)
    storage.commit(cut, content[:-1])
    content = storage.read(flipped, max_bytes=10**6)
    storage.commit(flipped, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    problems = "\n".join(verify_cache(storage, quick=quick).problems)
    assert f"{gone} (shard 0 of pass 1): missing" in problems
    assert f"{cut} (shard 0 of pass 1): " in problems
    assert "were committed" in problems
    assert (flipped in problems) != quick
    with pytest.raises(CacheCorrupt, match=r"s3://.*a committed file is missing"):
        open_cache(storage).read_rows(1, 0, 8, ["logits/values"])


def test_a_url_without_a_cache_is_an_error(
    s3: Any, on_web: Any, upload: Upload, tmp_path: Path
) -> None:
    for place in (f"{s3.bucket}/nothing", f"{on_web.url}/nothing"):
        with pytest.raises(DataError, match="no cache at"):
            open_cache(place)
    (on_web.root / "cache/manifest.json").unlink()
    with pytest.raises(CacheCorrupt, match="not complete"):
        open_cache(f"{on_web.url}/cache")


def test_a_reader_of_a_store_may_be_shared_by_threads(on_s3: Any, sound_cache: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    reader, local = open_cache(f"{on_s3.bucket}/cache"), open_cache(sound_cache)
    names = ["stage4/values", "pixel_hash", "view/crop"]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda b: reader.read_rows(0, *b, names), reader.blocks()))
    for block, rows in zip(local.blocks(), found, strict=True):
        expected = local.read_rows(0, *block, names)
        assert all(np.array_equal(rows[name], expected[name]) for name in names)
