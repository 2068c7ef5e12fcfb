"""Both forms hold the same: there, back, with and without images, after kills and by two."""

import gc
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import webdataset
from PIL import Image

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.forms import IMAGE
from scalekd.cache.reading.extensions import JoinedReader, open_extension
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError, UsageError
from scalekd.pipelines._source_options import ExtendConfig
from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache
from scalekd.pipelines.extend_cache import extend_cache
from scalekd.views import pixel_hash

Files = Callable[[Path], dict[str, bytes]]


def convert(source: Path, output: Path, **options: Any) -> Any:
    settings = {"format": "webdataset", "workers": 0, **options}
    return convert_cache(ConvertConfig(source=str(source), output=str(output), **settings))


def streamed(dataset: Iterable[Any]) -> list[Any]:
    """All that a foreign reader gives; such readers leave their files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = list(dataset)
        del dataset
        gc.collect()
    return found


def webdataset_samples(shards: str) -> list[dict[str, Any]]:
    return streamed(webdataset.WebDataset(shards, shardshuffle=False))


def timm_samples(root: Path) -> list[Any]:
    return streamed(
        timm.data.create_dataset("wds/", root=str(root), split="train", is_training=False)
    )


@pytest.mark.parametrize("embed", ["none", "source", "view", "pixels"])
def test_every_value_is_read_alike_and_converting_back_gives_every_file(
    sound_cache: Path,
    make_tars: Callable[[str], Path],
    tmp_path: Path,
    file_contents: Files,
    embed: str,
) -> None:
    zarr, tar = open_cache(sound_cache), open_cache(make_tars(embed))
    names = [array.name for array in zarr.layout.views]
    assert zarr.blocks() == tar.blocks()
    for pass_index in range(2):
        for block in zarr.blocks():
            there, here = (cache.read_rows(pass_index, *block, names) for cache in (zarr, tar))
            for name in names:
                np.testing.assert_array_equal(there[name], here[name])
                assert there[name].dtype == here[name].dtype
    assert not verify(make_tars(embed)).problems
    assert convert(make_tars(embed), tmp_path / "back", format="zarr").complete
    assert file_contents(tmp_path / "back") == file_contents(sound_cache)


def test_stage_one_writes_the_tars_that_a_conversion_gives(
    make_cache: Callable[..., Any],
    make_tars: Callable[[str], Path],
    tmp_path: Path,
    file_contents: Files,
) -> None:
    for embed in ("source", "view", "pixels"):
        made = make_cache(tmp_path / embed, format="webdataset", embed=embed)
        assert made.complete
        assert file_contents(tmp_path / embed) == file_contents(make_tars(embed))


def test_timm_and_webdataset_open_images_and_labels(
    make_tars: Callable[[str], Path], image_bytes: dict[int, bytes]
) -> None:
    root = make_tars("source")
    found = timm_samples(root)
    assert len(found) == 70
    for number, (image, label) in enumerate(found):
        expected = Image.open(io.BytesIO(image_bytes[number])).convert("RGB")
        assert label == number % 10
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    shards = f"{root}/passes/0001/{{000000..000002}}.tar"
    plain = webdataset_samples(shards)
    assert [sample["__key__"] for sample in plain] == [f"sample-{n:03d}" for n in range(70)]
    for number, sample in enumerate(plain):
        assert int(sample["cls"]) == number % 10
        assert sample["png" if number % 5 == 0 else "jpg"] == image_bytes[number]


def test_embedded_views_are_the_pixels_that_the_teacher_saw(
    make_tars: Callable[[str], Path],
) -> None:
    root = make_tars("view")
    reader = open_cache(root)
    for pass_index in range(2):
        shards = f"{root}/passes/{pass_index:04d}/{{000000..000002}}.tar"
        stored = np.concatenate(
            [
                reader.read_rows(pass_index, *block, ["pixel_hash"])["pixel_hash"]
                for block in reader.blocks()
            ]
        )
        for sample, expected in zip(webdataset_samples(shards), stored.tolist(), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(sample["webp"])))
            assert pixels.shape == (32, 32, 3)
            assert pixel_hash(pixels) == expected


def test_views_are_made_of_embedded_images_without_the_image_set(
    make_tars: Callable[[str], Path], tmp_path: Path, file_contents: Files
) -> None:
    convert(make_tars("source"), tmp_path / "views", embed="view", workers=1)
    assert file_contents(tmp_path / "views") == file_contents(make_tars("view"))
    with pytest.raises(UsageError, match=r"--embed source: .* pass --data-dir"):
        convert(make_tars("view"), tmp_path / "images", embed="source")


def test_embedded_pixels_are_converted_without_the_image_set(
    make_cache: Callable[..., Any],
    sound_cache: Path,
    make_tars: Callable[[str], Path],
    tmp_path: Path,
    file_contents: Files,
) -> None:
    zarr = tmp_path / "zarr"
    assert make_cache(zarr, embed="pixels").complete
    assert not verify(zarr).problems
    assert open_cache(zarr).manifest.plan == open_cache(sound_cache).manifest.plan
    for number, (source, form, embed, expected) in enumerate(
        [
            (make_tars("pixels"), "zarr", "pixels", zarr),
            (zarr, "webdataset", "pixels", make_tars("pixels")),
            (zarr, "webdataset", "view", make_tars("view")),
            (make_tars("view"), "zarr", "pixels", zarr),
            (make_tars("source"), "webdataset", "pixels", make_tars("pixels")),
            (zarr, "zarr", "none", sound_cache),
        ]
    ):
        output = tmp_path / f"made-{number}"
        assert convert(source, output, format=form, embed=embed, workers=number % 2).complete
        assert file_contents(output) == file_contents(expected)
    with pytest.raises(UsageError, match=r"--embed source: .* pass --data-dir"):
        convert(zarr, tmp_path / "images", embed="source")
    with pytest.raises(UsageError, match="Zarr form with --embed pixels already"):
        convert(zarr, tmp_path / "copy", format="zarr", embed="pixels")


def test_keys_with_dots_and_folders_make_one_sample_each(
    make_cache: Callable[..., Any], tmp_path: Path, image_bytes: dict[int, bytes]
) -> None:
    for number in range(12):
        path = tmp_path / f"images/train/n{number % 2}/a.b {number}é.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes[number])
    root = tmp_path / "cache"
    options: dict[str, Any] = {"data_dir": str(tmp_path / "images"), "passes": 1}
    make_cache(root, format="webdataset", embed="source", **options)
    reader = open_cache(root)
    samples = webdataset_samples(f"{root}/passes/0000/000000.tar")
    assert len(samples) == len(reader.samples) == 12
    for index, sample in enumerate(samples):
        number = int(reader.samples.key(index).split()[1].rstrip("é.JPEG"))
        image = sample["png" if number % 5 == 0 else "jpg"]
        assert image == image_bytes[number] == reader.read_rows(0, index, 1, [IMAGE])[IMAGE][0]
    assert len(timm_samples(root)) == 12


def test_skipped_images_and_a_shard_without_images_are_converted(
    make_cache: Callable[..., Any],
    image_set: Callable[..., Path],
    image_bytes: dict[int, bytes],
    tmp_path: Path,
    file_contents: Files,
) -> None:
    images = {n: b"no image" if n in (3, *range(24, 48)) else image_bytes[n] for n in range(60)}
    data = image_set(images)
    make_cache(tmp_path / "zarr", data_dir=str(data), skip_corrupt=True, passes=1)
    assert convert(tmp_path / "zarr", tmp_path / "tars", embed="view", data_dir=str(data)).complete
    assert not verify(tmp_path / "tars").problems
    assert not (tmp_path / "tars/passes/0000/000001.tar").exists()
    assert len(timm_samples(tmp_path / "tars")) == 60 - 25
    convert(tmp_path / "tars", tmp_path / "back", format="zarr")
    assert file_contents(tmp_path / "back") == file_contents(tmp_path / "zarr")


def test_shards_are_divided_and_the_last_part_completes_the_cache(
    sound_cache: Path, make_tars: Callable[[str], Path], tmp_path: Path, file_contents: Files
) -> None:
    assert not convert(sound_cache, tmp_path / "tars", shards=(1, 2)).complete
    with pytest.raises(CacheCorrupt, match="not complete"):
        open_cache(tmp_path / "tars")
    result = convert(sound_cache, tmp_path / "tars", shards=(0, 0))
    assert result.complete
    assert result.shards_written == 2
    assert file_contents(tmp_path / "tars") == file_contents(make_tars("none"))


def _run(source: Path, output: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "scalekd", "cache", "convert", str(source), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--format", "webdataset"], env=environment)


@pytest.mark.slow
def test_killed_conversions_continue_and_two_at_once_give_one_cache(
    sound_cache: Path, make_tars: Callable[[str], Path], tmp_path: Path, file_contents: Files
) -> None:
    output = tmp_path / "tars"
    process = _run(sound_cache, output)
    try:
        while process.poll() is None and not list(output.glob("records/0*/*.json")):
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (output / "manifest.json").exists()
    both = [_run(sound_cache, output) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert file_contents(output) == file_contents(make_tars("none"))


def test_files_of_an_interrupted_conversion_are_replaced(
    sound_cache: Path, make_tars: Callable[[str], Path], tmp_path: Path, file_contents: Files
) -> None:
    output = tmp_path / "tars"
    convert(sound_cache, output)
    (output / "manifest.json").unlink()
    (output / "records/0001/000001.json").unlink()
    tar = output / "passes/0001/000001.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    assert convert(sound_cache, output).shards_written == 1
    assert file_contents(output) == file_contents(make_tars("none"))


def test_a_damaged_source_is_refused(cache_copy: Path, tmp_path: Path) -> None:
    path = cache_copy / "passes/0001/stage4/values/c/4/0/0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorrupt, match="passes/0001/stage4/values/c/4/0/0"):
        convert(cache_copy, tmp_path / "tars")
    assert not (tmp_path / "tars/manifest.json").exists()


def test_other_images_are_refused(
    sound_cache: Path, image_set: Callable[..., Path], image_bytes: dict[int, bytes], tmp_path: Path
) -> None:
    swapped = {**image_bytes, 3: image_bytes[4]}
    for embed in ("source", "view"):
        with pytest.raises(CacheMismatch, match="another image"):
            convert(
                sound_cache,
                tmp_path / embed,
                embed=embed,
                data_dir=str(image_set(swapped, f"of-{embed}")),
            )
    fewer = {number: image_bytes[number] for number in range(60)}
    with pytest.raises(CacheMismatch, match="lacks 10 of the 70 samples"):
        convert(sound_cache, tmp_path / "c", embed="source", data_dir=str(image_set(fewer)))


def test_impossible_conversions_are_refused(
    sound_cache: Path,
    make_tars: Callable[[str], Path],
    make_cache: Callable[..., Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="in Zarr form already"):
        convert(sound_cache, tmp_path / "copy", format="zarr")
    with pytest.raises(UsageError, match="WebDataset form with --embed none already"):
        convert(make_tars("none"), tmp_path / "copy")
    with pytest.raises(UsageError, match="only tars contain encoded images"):
        convert(make_tars("none"), tmp_path / "copy", format="zarr", embed="view")
    with pytest.raises(UsageError, match=r"--embed view: .*pass --data-dir"):
        convert(sound_cache, tmp_path / "copy", embed="view")
    with pytest.raises(UsageError, match="the same folder"):
        convert(sound_cache, sound_cache)
    with pytest.raises(UsageError, match="then copy it with `scalekd cache push`"):
        convert_cache(
            ConvertConfig(source=str(sound_cache), output="s3://bucket/x", format="webdataset")
        )
    with pytest.raises(UsageError, match="shards 0 to 2"):
        convert(sound_cache, tmp_path / "copy", shards=(1, 3))
    with pytest.raises(DataError, match="no cache at"):
        convert(tmp_path / "nothing", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    shutil.copytree(make_tars("none"), tmp_path / "standing")
    with pytest.raises(CacheMismatch, match=r"--embed none, not in .*--embed source"):
        make_cache(tmp_path / "standing", format="webdataset", embed="source")
    with pytest.raises(CacheMismatch, match="--embed none, not in Zarr form"):
        make_cache(tmp_path / "standing")
    with pytest.raises(UsageError, match="--embed view: only tars"):
        make_cache(tmp_path / "copy", embed="view")
    make_cache(tmp_path / "other", seed=3, passes=1)
    with pytest.raises(CacheMismatch, match=r"contains another cache: .*views.seed is 3"):
        convert(make_tars("none"), tmp_path / "other", format="zarr")


def test_folders_may_be_given_as_file_urls(
    sound_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ConvertConfig(
        source=sound_cache.as_uri(),
        output=(tmp_path / "tars").as_uri(),
        format="webdataset",
        workers=0,
    )
    assert convert_cache(config).complete
    assert [path.name for path in tmp_path.iterdir()] == ["tars"]
    assert verify(tmp_path / "tars").problems == []


def test_passes_are_added_to_tars(make_cache: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    make_cache(root, format="webdataset", embed="view", passes=1)
    before = {path: path.stat().st_mtime_ns for path in root.glob("passes/0000/*")}
    made = make_cache(root, format="webdataset", embed="view", passes=2)
    assert made.shards_written == 3
    assert not verify(root).problems
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_members_have_no_owner_and_no_time(make_tars: Callable[[str], Path]) -> None:
    with tarfile.open(make_tars("view") / "passes/0000/000002.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 3 * 22
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}


def test_extensions_are_copied(
    cache_copy: Path, tiny_images: Path, tmp_path: Path, file_contents: Files
) -> None:
    extend_cache(
        ExtendConfig(
            cache=cache_copy,
            data_dir=str(tiny_images),
            name="more",
            logits="topk:2",
            workers=0,
        )
    )
    result = convert(cache_copy, tmp_path / "tars")
    assert result.extensions == ("more",)
    assert file_contents(tmp_path / "tars/extensions") == file_contents(cache_copy / "extensions")
    assert verify(tmp_path / "tars").problems == []
    base = open_cache(tmp_path / "tars")
    joined = JoinedReader(base, {"more": open_extension(base, "more")})
    names = [array.name for array in joined.layout.views if array.name.startswith("more:")]
    assert set(joined.read_rows(1, 0, 4, names)) == set(names) != set()
    convert(tmp_path / "tars", tmp_path / "back", format="zarr")
    assert file_contents(tmp_path / "back") == file_contents(cache_copy)
