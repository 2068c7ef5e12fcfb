"""Stage one: the same job gives the same bytes, whatever happened on the way."""

import contextlib
import errno
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.documents.manifest import Manifest
from scalekd.cache.writing import writer as cache_writer
from scalekd.cache.writing.finishing import finish
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError, EnvironmentFault, UsageError
from scalekd.pipelines import _calibration_views, _sizes
from scalekd.pipelines import cache_teacher as stage_one

MakeCache = Callable[..., Any]
FileContents = Callable[[Path], dict[str, bytes]]


def test_the_manifest_describes_the_requested_cache(sound_cache: Path) -> None:
    reader = open_cache(sound_cache)
    identity = reader.identity
    assert reader.num_passes == 2
    assert reader.manifest.num_views == 140
    assert len(reader.samples) == 70
    assert identity.num_shards == 3
    assert identity.block_size == 8
    assert identity.data.class_names[9] == "class 9"
    assert identity.views.view_size == (32, 32)
    measured = reader.manifest.plan.provenance.measured
    assert 0 < measured["4"]["raw"]["mean"] < 2**-22  # float16: half a unit in the last place
    on_disk = sum(path.stat().st_size for path in sound_cache.rglob("*") if path.is_file())
    records = sum(path.stat().st_size for path in sound_cache.glob("records/*/*"))
    manifest = (sound_cache / "manifest.json").stat().st_size
    assert reader.manifest.total_bytes == on_disk - records - manifest


# The same bytes


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_byte(
    workers: int,
    tmp_path: Path,
    sound_cache: Path,
    make_cache: MakeCache,
    file_contents: FileContents,
) -> None:
    make_cache(tmp_path / "cache", workers=workers)
    assert file_contents(tmp_path / "cache") == file_contents(sound_cache)


class _Stop(BaseException):
    """Not an ``Exception``, as a signal is none: nobody may swallow it."""


@pytest.mark.parametrize("seed", range(4))
def test_an_interrupted_run_is_finished_to_the_same_bytes(
    seed: int,
    tmp_path: Path,
    sound_cache: Path,
    make_cache: MakeCache,
    file_contents: FileContents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stops three times at a random file, before or after it was written; loses no record."""
    chance, root = random.Random(seed), tmp_path / "cache"
    commit = cache_writer.CommittingStore.set
    committed: dict[str, bytes] = {}
    for _ in range(3):
        countdown = chance.randrange(1, 60)

        async def stopping(self: Any, key: str, value: Any) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown == 0 and chance.random() < 0.5:
                raise _Stop
            await commit(self, key, value)
            if countdown == 0:
                raise _Stop

        monkeypatch.setattr(cache_writer.CommittingStore, "set", stopping)
        with contextlib.suppress(_Stop):
            make_cache(root)
        records = {name: c for name, c in file_contents(root).items() if "records/" in name}
        assert committed.items() <= records.items()
        committed = records
    monkeypatch.undo()
    result = make_cache(root)
    assert result.complete
    assert result.shards_found == sum("records/0" in name for name in committed)
    assert file_contents(root) == file_contents(sound_cache)


def test_only_shards_without_a_record_are_written_again(
    cache_copy: Path, sound_cache: Path, make_cache: MakeCache, file_contents: FileContents
) -> None:
    for lost in ("records/0001/000001.json", "records/samples/000001.json", "manifest.json"):
        (cache_copy / lost).unlink()
    (cache_copy / "passes/0001/stage4/values/c/4/0/0").write_bytes(b"half a fi")
    (cache_copy / "passes/0001/pixel_hash/c/1").unlink()
    with pytest.raises(CacheCorrupt, match="not complete"):
        open_cache(cache_copy)
    result = make_cache(cache_copy)
    assert (result.shards_written, result.shards_found) == (1, 5)
    assert result.views_written == 24
    assert file_contents(cache_copy) == file_contents(sound_cache)


def test_a_finished_cache_is_not_changed(
    cache_copy: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache_copy.rglob("*")}
    result = make_cache(cache_copy)
    assert (result.shards_written, result.views_written, result.complete) == (0, 0, True)
    assert {path: path.stat().st_mtime_ns for path in cache_copy.rglob("*")} == before


def test_several_commands_with_shards_write_one_cache(
    tmp_path: Path, sound_cache: Path, make_cache: MakeCache, file_contents: FileContents
) -> None:
    root = tmp_path / "cache"
    part = make_cache(root, shards=(2, 2))
    assert (part.complete, part.shards_written, part.total_bytes) == (False, 2, None)
    with pytest.raises(CacheCorrupt, match="not complete"):
        open_cache(root)
    assert make_cache(root, shards=(0, 1)).complete
    assert file_contents(root) == file_contents(sound_cache)


def test_a_cache_grows_by_passes_and_never_shrinks(
    tmp_path: Path, sound_cache: Path, make_cache: MakeCache, file_contents: FileContents
) -> None:
    root = tmp_path / "cache"
    make_cache(root, passes=1)
    first = file_contents(root)
    assert open_cache(root).num_passes == 1
    grown = make_cache(root, passes=2)
    assert (grown.shards_found, grown.shards_written) == (3, 3)
    after = file_contents(root)
    assert after == file_contents(sound_cache)
    del first["manifest.json"]
    assert first.items() <= after.items()
    again = make_cache(root, passes=1)
    assert (again.num_passes, again.shards_written) == (2, 0)
    assert file_contents(root) == after


def test_a_job_of_fewer_passes_that_ends_last_does_not_shrink_the_manifest(
    cache_copy: Path,
) -> None:
    reader = open_cache(cache_copy)
    manifest = finish(reader.cache, 1)
    assert manifest is not None
    assert manifest.num_passes == 2
    assert open_cache(cache_copy).num_passes == 2


def test_passes_contain_different_views_of_the_same_samples(sound_cache: Path) -> None:
    reader = open_cache(sound_cache)
    for first, count in reader.blocks():
        zero, one = (reader.read_rows(p, first, count, ["pixel_hash"]) for p in (0, 1))
        assert not (zero["pixel_hash"] == one["pixel_hash"]).any()


# Another job on the same folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 11}, "batch_size is 10 in the cache, 11 here"),
        ({"seed": 1}, "views.seed is 0 in the cache, 1 here"),
        ({"aug": "center"}, "views.policy"),
        ({"logits": "topk:2"}, "request.logits is full in the cache, topk:2 here"),
        ({"stages": (4,)}, "request.stages"),
        ({"codec": "int8"}, "request.codec"),
        ({"precision": "bf16"}, "precision"),
        ({"shard_size": 35}, "shard_size is 24"),
        ({"limit": 60}, "data.num_samples is 70 in the cache, 60 here"),
        ({"img_size": 48}, "teacher.img_size"),
        ({"skip_corrupt": True}, "skip_corrupt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options_are_refused_by_name_and_change_nothing(
    change: dict[str, Any],
    named: str,
    cache_copy: Path,
    make_cache: MakeCache,
    file_contents: FileContents,
) -> None:
    before = file_contents(cache_copy)
    with pytest.raises(CacheMismatch, match="begun for something else") as caught:
        make_cache(cache_copy, **{"passes": 3, **change})
    assert named in str(caught.value)
    assert file_contents(cache_copy) == before


def test_images_that_changed_between_passes_are_noticed(
    tmp_path: Path,
    make_cache: MakeCache,
    image_bytes: dict[int, bytes],
    image_set: Callable[..., Path],
) -> None:
    """Same keys, same sizes, other bytes: the table of samples would tell of other images."""
    data = image_set(image_bytes)
    make_cache(tmp_path / "cache", data_dir=str(data), passes=1)
    png = image_bytes[10]
    text = png[:-12] + bytes(12)  # what follows the last chunk decides no pixel
    image_set({**image_bytes, 10: text})
    with pytest.raises(CacheMismatch, match="shard 0 was cached with other samples"):
        make_cache(tmp_path / "cache", data_dir=str(data), passes=2)


def test_a_shard_that_another_job_commits_meanwhile_is_skipped(
    cache_copy: Path,
    make_cache: MakeCache,
    sound_cache: Path,
    file_contents: FileContents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work was divided while the record was missing; it is there when the shard begins."""
    lost = "records/0001/000002.json"
    (cache_copy / lost).unlink()
    write = stage_one._write_shards

    def meanwhile(*arguments: Any) -> int:
        shutil.copy(sound_cache / lost, cache_copy / lost)
        return write(*arguments)

    monkeypatch.setattr(stage_one, "_write_shards", meanwhile)
    result = make_cache(cache_copy)
    assert (result.complete, result.shards_written) == (True, 0)
    assert file_contents(cache_copy) == file_contents(sound_cache)


def test_machines_that_begin_at_once_use_the_tables_of_the_first(
    tmp_path: Path,
    make_cache: MakeCache,
    file_contents: FileContents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their calibrations differ in the last bits; nothing of the second one's is left."""
    codec = {"codec": "transform:error=0.05", "passes": 1}
    make_cache(tmp_path / "first", **codec)
    calibrate = stage_one.calibrate

    def late_and_otherwise(*arguments: Any, **keywords: Any) -> Any:
        run = _calibration_views.run_teacher

        def otherwise(*inner: Any) -> Any:
            output = run(*inner)
            output.features[4] *= 1.001
            return output

        with monkeypatch.context() as patch:
            patch.setattr(_calibration_views, "run_teacher", otherwise)
            made = calibrate(*arguments, **keywords)
        shutil.copytree(tmp_path / "first/tables", tmp_path / "cache/tables", dirs_exist_ok=True)
        shutil.copy(tmp_path / "first/plan.json", tmp_path / "cache/plan.json")
        return made

    monkeypatch.setattr(stage_one, "calibrate", late_and_otherwise)
    result = make_cache(tmp_path / "cache", **codec)
    assert result.complete
    assert file_contents(tmp_path / "cache") == file_contents(tmp_path / "first")


# Folders that are no cache


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content", ["notes.txt", "samples/photo.jpg", "tables/sales.csv", "records/1.json", "zarr.json"]
)
def test_a_folder_of_something_else_is_neither_used_nor_deleted(
    content: str, overwrite: bool, tmp_path: Path, make_cache: MakeCache
) -> None:
    path = tmp_path / "mine" / content
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(UsageError, match="contains files that are not part of a cache"):
        make_cache(tmp_path / "mine", overwrite=overwrite)
    assert path.read_text() == "precious"
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [path]


def test_overwrite_deletes_caches_only(cache_copy: Path, make_cache: MakeCache) -> None:
    (cache_copy / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        make_cache(cache_copy, overwrite=True, seed=1)
    assert verify(cache_copy).problems == [
        f"{cache_copy / 'thesis.txt'}: no record names this file"
    ]
    (cache_copy / "thesis.txt").unlink()
    (cache_copy / "plan.json").write_text("damaged")
    make_cache(cache_copy, overwrite=True, seed=1, passes=1)
    assert open_cache(cache_copy).identity.views.seed == 1
    assert verify(cache_copy).problems == []


def test_files_of_a_hub_repository_are_kept(cache_copy: Path, make_cache: MakeCache) -> None:
    for name in ("README.md", ".gitattributes"):
        (cache_copy / name).write_text("of the repository")
    assert verify(cache_copy).problems == []
    make_cache(cache_copy, overwrite=True, passes=1)
    assert (cache_copy / "README.md").read_text() == "of the repository"
    assert verify(cache_copy).problems == []


@pytest.mark.parametrize("option", ["licence", "note"])
def test_licence_and_note_of_a_plan_do_not_change(
    option: str, tmp_path: Path, make_cache: MakeCache
) -> None:
    make_cache(tmp_path / "cache", passes=1, shards=(0, 0), **{option: "mit"})
    make_cache(tmp_path / "cache", passes=1, shards=(1, 1), **{option: "mit"})
    with pytest.raises(CacheMismatch, match=f"--{option}: .*begun with 'mit', not 'gpl'"):
        make_cache(tmp_path / "cache", passes=1, **{option: "gpl"})
    assert make_cache(tmp_path / "cache", passes=1).complete


def test_nothing_is_overwritten_for_a_job_that_cannot_start(
    cache_copy: Path, make_cache: MakeCache, file_contents: FileContents
) -> None:
    before = file_contents(cache_copy)
    for change, error in (
        ({"data_dir": "/nowhere"}, DataError),
        ({"img_size": 33}, UsageError),
        ({"codec": "zip"}, UsageError),
        ({"shards": (0, 0)}, UsageError),
    ):
        with pytest.raises(error):
            make_cache(cache_copy, overwrite=True, **change)
    assert file_contents(cache_copy) == before


def test_a_file_at_the_output_is_refused(tmp_path: Path, make_cache: MakeCache) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        make_cache(tmp_path / "file")


@pytest.mark.parametrize("shards", [(0, 3), (2, 1), (3, 3)])
def test_shards_beyond_the_last_are_refused_before_anything_is_written(
    shards: tuple[int, int], tmp_path: Path, make_cache: MakeCache
) -> None:
    with pytest.raises(UsageError, match="the cache has shards 0 to 2"):
        make_cache(tmp_path / "cache", shards=shards)
    assert not (tmp_path / "cache").exists()


# Corrupt images


@pytest.fixture
def corrupt_set(image_bytes: dict[int, bytes], image_set: Callable[..., Path]) -> Path:
    """Images 1, 30 and all of the third shard's first block but one are cut or rubbish."""
    damaged = {1: image_bytes[1][:200], 30: b"no image"}
    damaged |= dict.fromkeys(range(48, 55), b"")
    return image_set({**image_bytes, **damaged})


def test_a_corrupt_image_is_named(tmp_path: Path, corrupt_set: Path, make_cache: MakeCache) -> None:
    with pytest.raises(DataError, match=r"sample-001.*--skip-corrupt") as caught:
        make_cache(tmp_path / "cache", data_dir=str(corrupt_set), workers=1)
    assert "\n" not in str(caught.value)


def test_skipped_images_are_counted_and_the_others_are_cached(
    tmp_path: Path, corrupt_set: Path, make_cache: MakeCache, file_contents: FileContents
) -> None:
    from scalekd.images import open_dataset
    from scalekd.loading import CachedViewLoader

    root, again = tmp_path / "cache", tmp_path / "again"
    result = make_cache(root, data_dir=str(corrupt_set), skip_corrupt=True)
    skipped = [1, 30, *range(48, 55)]
    assert result.skipped == 9
    assert result.views_written == 2 * 61
    reader = open_cache(root)
    assert reader.manifest.skipped == tuple(f"sample-{number:03d}" for number in skipped)
    kept = [number for number in range(70) if number not in skipped]
    keys = [reader.samples.key(i) for i in range(len(reader.samples))]
    assert keys == [f"sample-{number:03d}" for number in kept]
    assert reader.samples.labels.tolist() == [number % 10 for number in kept]
    assert reader.samples.starts.tolist() == [0, 23, 46, 61]
    # 23 views in blocks of 8: the last of a shard is shorter, and no row moves to another shard.
    assert reader.blocks()[:4] == [(0, 8), (8, 8), (16, 7), (23, 8)]
    loader = CachedViewLoader(reader, open_dataset(str(corrupt_set)), batch_size=61)
    for epoch in (0, 1):
        (batch,) = loader.epoch(epoch)  # every view's hash is checked
        assert sorted(batch["label"].tolist()) == sorted(number % 10 for number in kept)
    assert verify(root).problems == []
    make_cache(again, data_dir=str(corrupt_set), skip_corrupt=True, shards=(1, 2))
    make_cache(again, data_dir=str(corrupt_set), skip_corrupt=True, workers=1)
    assert file_contents(again) == file_contents(root)


def test_a_shard_may_lose_all_its_images(
    tmp_path: Path,
    image_bytes: dict[int, bytes],
    image_set: Callable[..., Path],
    make_cache: MakeCache,
) -> None:
    data = image_set({**image_bytes, **dict.fromkeys(range(24), b"x")})
    make_cache(tmp_path / "cache", data_dir=str(data), skip_corrupt=True, passes=1)
    reader = open_cache(tmp_path / "cache")
    assert reader.samples.starts.tolist() == [0, 0, 24, 46]
    assert reader.samples.key(0) == "sample-024"
    rows = [reader.read_rows(0, *block, ["pixel_hash"])["pixel_hash"] for block in reader.blocks()]
    assert len(np.unique(np.concatenate(rows))) == 46
    assert len(reader.witnesses) == 8
    assert verify(tmp_path / "cache").problems == []


def test_an_image_set_of_corrupt_images_is_refused(
    tmp_path: Path, image_set: Callable[..., Path], make_cache: MakeCache
) -> None:
    data = image_set(dict.fromkeys(range(3), b"x"))
    with pytest.raises(DataError, match="every image is corrupt"):
        make_cache(tmp_path / "cache", data_dir=str(data), skip_corrupt=True)


# The machine's faults


def test_a_job_larger_than_the_free_space_is_refused_at_its_start(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """140 views of 2 stages x 5 tokens x 64 channels in float16 take 179 kB, 0.8 of it at least."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 140_000))
    with pytest.raises(EnvironmentFault, match="140 views need at least"):
        make_cache(tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 500_000))
    assert make_cache(tmp_path / "cache").complete
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    assert make_cache(tmp_path / "cache").complete  # nothing is missing


@pytest.mark.parametrize("after", [1, 5, 60])
def test_a_disk_that_fills_up_leaves_a_cache_that_can_be_finished(
    after: int,
    tmp_path: Path,
    sound_cache: Path,
    make_cache: MakeCache,
    file_contents: FileContents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sync, left = os.fsync, after

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"disk is full.*What was committed is kept"):
        make_cache(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.partial"))
    monkeypatch.undo()
    assert make_cache(tmp_path / "cache").complete
    assert file_contents(tmp_path / "cache") == file_contents(sound_cache)


def test_a_damaged_manifest_is_written_again_from_the_records(
    cache_copy: Path, make_cache: MakeCache, sound_cache: Path, file_contents: FileContents
) -> None:
    (cache_copy / "manifest.json").write_text("{}")
    with pytest.raises(CacheCorrupt, match="delete it and run the same command again"):
        make_cache(cache_copy)
    (cache_copy / "manifest.json").unlink()
    make_cache(cache_copy)
    assert file_contents(cache_copy) == file_contents(sound_cache)


# What a cache may hold


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"stages": (), "logits": "topk:2"}, {"logits"}),
        ({"stages": (4,), "logits": "none"}, {"stage4"}),
        ({"stages": (4,), "codec": "int8"}, {"stage4", "logits"}),
    ],
    ids=["logits-only", "features-only", "int8"],
)
def test_caches_of_chosen_targets_contain_only_these(
    options: dict[str, Any], groups: set[str], tmp_path: Path, make_cache: MakeCache
) -> None:
    make_cache(tmp_path / "cache", passes=1, limit=20, **options)
    reader = open_cache(tmp_path / "cache")
    found = {array.name.split("/")[0] for array in reader.layout.views}
    assert found == groups | {"view", "pixel_hash"}
    assert reader.identity.tail is not None  # for live teachers, whatever is kept
    assert verify(tmp_path / "cache").problems == []


@pytest.mark.parametrize(
    ("shard_size", "block_size"),
    [(256, 256), (4096, 256), (16, 16), (100, 100), (300, 150), (1000, 250), (257, 1)],
)
def test_blocks_cut_a_shard_evenly_and_as_large_as_they_may(
    shard_size: int, block_size: int
) -> None:
    assert _sizes.default_block_size(shard_size) == block_size


@pytest.mark.parametrize(
    ("num_samples", "shard_size"),
    [(1, 256), (16_384, 256), (16_385, 512), (1_281_167, 4096), (10**9, 4096)],
)
def test_the_default_shard_size_depends_on_the_number_of_samples(
    num_samples: int, shard_size: int
) -> None:
    assert _sizes.default_shard_size(num_samples) == shard_size


def test_a_manifest_contains_neither_paths_nor_the_machines_name(
    sound_cache: Path, tiny_images: Path
) -> None:
    text = (sound_cache / "manifest.json").read_text()
    for place in (str(sound_cache), str(tiny_images), os.uname().nodename, "20"):
        if place != "20":
            assert place not in text
    assert Manifest.model_validate_json(text).plan.provenance.note is None


def test_calibration_runs_the_teacher_once_on_each_view(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two codecs, prefix tokens and held-out errors come out of one pass; nothing stays behind."""
    seen: list[int] = []
    run = _calibration_views.run_teacher

    def counted(teacher: Any, pixels: Any, precision: str) -> Any:
        seen.append(len(pixels))
        return run(teacher, pixels, precision)

    monkeypatch.setattr(_calibration_views, "run_teacher", counted)
    made = make_cache(tmp_path / "cache", codec="transform:error=0.05", passes=1)
    assert made.complete
    assert sum(seen) == made.num_samples
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 2), (4, 1, 3), (64, 8, 7), (256, 1, 16)]
)
def test_coding_threads_are_a_processs_share_of_the_cores(
    cores: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalekd.pipelines._write_shards import num_coding_threads

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert num_coding_threads() == threads
