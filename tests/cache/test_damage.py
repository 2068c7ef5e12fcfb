"""Damage of every kind to files of every kind is found by verification and by reading."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from scalekd.cache import CacheReader, open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Manifest
from scalekd.cache.files import digest
from scalekd.cache.layout import ShardId
from scalekd.errors import CacheCorrupt, CacheError, CacheMismatch, DataError
from tests.reliability.mutations import sealed


def _read_everything(root: Path) -> None:
    """What training reads: manifest, plan, records, tables of samples, witnesses, tail, targets."""
    reader: CacheReader = open_cache(root)
    _ = reader.samples, reader.witnesses
    identity = reader.identity
    reader.file(identity.tail, identity.tail_digest)
    names = [array.name for array in reader.layout.views]
    for pass_index in range(reader.num_passes):
        for first, count in reader.blocks():
            reader.read_rows(pass_index, first, count, names)


def _flip(content: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    return bytes(damaged)


_DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": _flip,
    "one-byte-short": lambda content: content[:-1],
    "halved": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "missing": lambda content: None,
}

_FILES = {
    "block of features": "passes/0001/stage4/values/c/4/0/0",
    "block of logits": "passes/0000/logits/values/c/8/0",
    "pixel hashes": "passes/0001/pixel_hash/c/2",
    "crops": "passes/0000/view/crop/c/0/0",
    "keys": "samples/key/c/1/0",
    "labels": "samples/label/c/2",
    "array metadata": "passes/0001/stage3/values/zarr.json",
    "sample metadata": "samples/source_hash/zarr.json",
    "record of a pass": "records/0001/000002.json",
    "record of samples": "records/samples/000000.json",
    "manifest": "manifest.json",
    "plan": "plan.json",
    "tail": "tables/tail-*.safetensors",
    "witnesses": "tables/witnesses-*.safetensors",
}


@pytest.fixture(scope="module")
def cache(sound_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sound cache; every test puts back what it damaged."""
    return Path(shutil.copytree(sound_cache, tmp_path_factory.mktemp("damage") / "cache"))


@pytest.fixture(scope="module")
def other_cache(make_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images and shapes, other views."""
    root = tmp_path_factory.mktemp("other") / "cache"
    make_cache(root, seed=1)
    return root


def test_an_intact_cache_has_no_findings(cache: Path) -> None:
    found = verify(cache)
    assert found.problems == []
    assert found.num_files == sum(1 for path in cache.rglob("*") if path.is_file()) - 1
    _read_everything(cache)
    assert verify(cache, quick=True).problems == []


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize("kind", _FILES)
def test_damage_is_an_error_that_names_the_file_and_never_zeros(
    kind: str, damage: str, cache: Path
) -> None:
    (path,) = cache.glob(_FILES[kind])
    content = path.read_bytes()
    damaged = _DAMAGES[damage](content)
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    try:
        with pytest.raises(CacheError) as met:
            _read_everything(cache)
        assert path.name in str(met.value)
        assert str(cache) in str(met.value)
        if kind == "manifest":
            with pytest.raises(CacheError, match="manifest"):
                verify(cache)
        else:
            found = verify(cache)
            relative = path.relative_to(cache).as_posix()
            assert any(relative in problem for problem in found.problems)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("damage", _DAMAGES)
def test_verify_names_every_damaged_file_and_its_shard(damage: str, cache: Path) -> None:
    """All files at once; records apart, for a shard is judged by its record."""
    names = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
    records = {name for name in names if name.startswith("records/")}
    for chosen in (records, names - records - {"manifest.json"}):
        contents = {name: (cache / name).read_bytes() for name in chosen}
        for name, content in contents.items():
            damaged = _DAMAGES[damage](content)
            (cache / name).unlink()
            if damaged is not None:
                (cache / name).write_bytes(damaged)
        found = verify(cache)
        quick = verify(cache, quick=True)
        for name, content in contents.items():
            (cache / name).write_bytes(content)
        expected = {ShardId(unit, shard) for unit in ("samples", 0, 1) for shard in range(3)}
        assert found.damaged == expected
        for name in chosen:
            assert any(str(cache / name) in problem for problem in found.problems), name
        if damage != "flipped":  # sizes cannot tell; checksums can
            assert quick.damaged == expected
    assert verify(cache).problems == []


def test_swapped_shards_are_noticed(cache_copy: Path) -> None:
    """Files of the same shape with valid checksums, but of another shard."""
    first, second = (cache_copy / f"passes/0000/stage4/values/c/{c}/0/0" for c in (0, 3))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert {ShardId(0, 0), ShardId(0, 1)} == verify(cache_copy).damaged
    with pytest.raises(CacheCorrupt, match=r"values/c/0/0/0"):
        _read_everything(cache_copy)


def test_swapped_passes_are_noticed(cache_copy: Path) -> None:
    for folder in ("passes", "records"):
        zero, one, aside = (cache_copy / folder / name for name in ("0000", "0001", "aside"))
        zero.rename(aside)
        one.rename(zero)
        aside.rename(one)
    assert len(verify(cache_copy).damaged) == 6
    with pytest.raises(CacheCorrupt, match="files were swapped"):
        _read_everything(cache_copy)


def test_whole_shards_of_another_cache_are_noticed(cache_copy: Path, other_cache: Path) -> None:
    """Copied with their record: everything about them is valid, but they belong elsewhere."""
    for relative in ("passes/0001", "records/0001"):
        shutil.rmtree(cache_copy / relative)
        shutil.copytree(other_cache / relative, cache_copy / relative)
    assert {ShardId(1, shard) for shard in range(3)} <= verify(cache_copy).damaged
    with pytest.raises(CacheMismatch, match="the shard belongs to cache"):
        _read_everything(cache_copy)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_manifest_or_plan_of_another_cache_is_noticed(
    name: str, cache_copy: Path, other_cache: Path
) -> None:
    shutil.copy(other_cache / name, cache_copy / name)
    with pytest.raises(CacheError):
        _read_everything(cache_copy)
    assert verify(cache_copy).problems


def test_an_older_manifest_is_reported_as_stale(
    cache_copy: Path, make_cache: Any, tmp_path: Path
) -> None:
    """Training continues with the passes that the manifest names; verification reports it."""
    one = tmp_path / "one-pass"
    make_cache(one, passes=1)
    shutil.copy(one / "manifest.json", cache_copy / "manifest.json")
    (problem,) = verify(cache_copy).problems
    assert "manifest.json: stale: pass 1 is complete" in problem
    assert verify(cache_copy, quick=True).problems == [problem]
    reader = open_cache(cache_copy)
    assert reader.num_passes == 1
    with pytest.raises(CacheMismatch, match="pass 1 was requested, the cache has 1"):
        reader.read_rows(1, 0, 8, ["pixel_hash"])
    (cache_copy / "records/0001/000002.json").unlink()
    assert verify(cache_copy).problems == [], "a pass that is being added is no fault"


@pytest.mark.parametrize(
    "change", [{"num_views": 139}, {"total_bytes": 1}, {"skipped": ("sample-003",)}]
)
def test_a_manifest_that_was_edited_and_sealed_again_is_noticed(
    change: dict[str, Any], cache_copy: Path
) -> None:
    manifest = Manifest.model_validate_json((cache_copy / "manifest.json").read_bytes())
    edited = manifest.model_copy(update={**change, "digest": ""}).sealed()
    (cache_copy / "manifest.json").write_bytes(canonical(edited))
    (problem,) = verify(cache_copy).problems
    assert f"{next(iter(change))} does not follow from the records" in problem


def test_unexpected_files_are_named_but_unfinished_ones_are_not(cache_copy: Path) -> None:
    (cache_copy / "samples" / ".key.somewhere-1-0123abcd.partial").write_bytes(b"")
    (cache_copy / "passes" / "0007").mkdir()  # a pass that is being added
    (cache_copy / "passes" / "0007" / "zarr.json").write_bytes(b"{}")
    assert verify(cache_copy).problems == []
    (cache_copy / "passes" / "0001" / "stage4" / "extra").write_bytes(b"")
    (cache_copy / "records" / "0000" / "000003.json").write_bytes(b"{}")
    (cache_copy / "link").symlink_to("/etc/passwd")
    problems = verify(cache_copy).problems
    assert len(problems) == 3
    assert all(
        any(name in problem for problem in problems)
        for name in ("stage4/extra", "000003.json", "link: a symbolic link")
    )


@pytest.mark.parametrize("kind", ["block of features", "record of a pass", "tail"])
def test_a_link_is_not_followed(kind: str, cache_copy: Path, tmp_path: Path) -> None:
    """Not even to the very bytes that were committed."""
    (path,) = cache_copy.glob(_FILES[kind])
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheCorrupt, match="symbolic link"):
        _read_everything(cache_copy)
    assert verify(cache_copy).problems


def test_a_folder_or_pipe_instead_of_a_file_does_not_hang(cache_copy: Path) -> None:
    first, second = (cache_copy / f"passes/0000/pixel_hash/c/{shard}" for shard in (0, 1))
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(CacheCorrupt, match="not a plain file"):
        _read_everything(cache_copy)
    second.unlink()
    second.mkdir()
    assert len(verify(cache_copy).problems) == 2


def test_a_codec_of_another_format_is_not_run(cache_copy: Path) -> None:
    """Metadata made consistent with the manifest, naming a codec outside format 1."""
    path = cache_copy / "passes/0000/pixel_hash/zarr.json"
    document = json.loads(path.read_text())
    document["codecs"][-1] = {"name": "gzip", "configuration": {"level": 1}}
    path.write_text(json.dumps(document))
    manifest = Manifest.model_validate_json((cache_copy / "manifest.json").read_bytes())
    files = {**manifest.files, "passes/0000/pixel_hash/zarr.json": digest(path.read_bytes())}
    manifest = manifest.model_copy(update={"files": files, "digest": ""}).sealed()
    (cache_copy / "manifest.json").write_bytes(canonical(manifest))
    with pytest.raises(CacheCorrupt, match=r"gzip.*blosc"):
        _read_everything(cache_copy)


def test_a_folder_without_a_cache_is_a_data_error_and_not_damage(
    tmp_path: Path, cache_copy: Path
) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_cache(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains neither"):
        open_cache(tmp_path / "empty")
    (cache_copy / "manifest.json").unlink()
    with pytest.raises(CacheCorrupt, match=r"not complete.*cache-teacher"):
        open_cache(cache_copy)


@pytest.mark.filterwarnings("ignore:Numcodecs codecs")
def test_other_zarr_readers_get_the_same_numbers(sound_cache: Path) -> None:
    """Nothing of scalekd, only the library: the stored arrays are Zarr."""
    group = zarr.open_group(sound_cache, mode="r")
    reader = open_cache(sound_cache)
    names = [array.name for array in reader.layout.views]
    for pass_index in range(2):
        plain = group[f"passes/{pass_index:04d}"]
        for first, count in reader.blocks():
            ours = reader.read_rows(pass_index, first, count, names)
            for name in names:
                assert np.array_equal(plain[name][first : first + count], ours[name])
    keys = [bytes(row).rstrip(b"\0").decode() for row in group["samples/key"][:]]
    assert keys == [reader.samples.key(i) for i in range(70)]
    assert group["samples/label"][:].tolist() == [number % 10 for number in range(70)]


@pytest.mark.parametrize("column", ["key", "label", "source_hash"])
def test_a_table_of_samples_is_compared_with_the_hash_in_its_record(
    column: str, cache_copy: Path, file_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    """Every digest is right; the first shard's column is the second's."""
    base = file_contents(cache_copy)
    ending = "/0" if column == "key" else ""
    other = base[f"samples/{column}/c/1{ending}"]
    for relative, content in sealed(base, {f"samples/{column}/c/0{ending}": other}).items():
        (cache_copy / relative).write_bytes(content)
    reader = open_cache(cache_copy)
    with pytest.raises(CacheCorrupt, match="table of shard 0 has other samples"):
        _ = reader.samples
    assert any("table of shard 0" in problem for problem in verify(cache_copy).problems)
