"""A damaged cache comes back to the byte, and nothing but what was damaged is made again."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.cache.care.verify import verify
from scalekd.errors import CacheCorrupt, CacheError, CacheMismatch, DataError, UsageError
from scalekd.pipelines import _sources
from scalekd.pipelines._source_options import CacheSources, RepairConfig
from scalekd.pipelines.repair_cache import RepairResult, repair_cache

FileContents = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def repair(tiny_images: Path) -> Callable[..., RepairResult]:
    def run(root: Path, **changes: Any) -> RepairResult:
        settings = {"data_dir": str(tiny_images), "workers": 0, **changes}
        return repair_cache(RepairConfig(cache=root, **settings))

    return run


@pytest.fixture
def sound(sound_cache: Path, file_contents: FileContents) -> dict[str, bytes]:
    return file_contents(sound_cache)


def _one(root: Path, pattern: str) -> Path:
    (path,) = root.glob(pattern)
    return path


_NEEDS_TEACHER = {
    "features": ("passes/0001/stage4/values/c/4/0/0", ("1", 1)),
    "pixel hashes": ("passes/0000/pixel_hash/c/2", ("0", 2)),
}
_NEEDS_IMAGES = {"keys": ("samples/key/c/1/0", ("samples", 1))}
_NEEDS_NOTHING = [
    "manifest.json",
    "plan.json",
    "zarr.json",
    "passes/0001/stage3/values/zarr.json",
    "records/0001/000002.json",
    "records/samples/000000.json",
]


@pytest.mark.parametrize("damage", ["flipped", "emptied", "missing"])
@pytest.mark.parametrize("kind", [*_NEEDS_TEACHER, *_NEEDS_IMAGES])
def test_only_the_damaged_file_of_a_shard_is_written_again(
    kind: str,
    damage: str,
    cache_copy: Path,
    repair: Callable[..., RepairResult],
    sound: dict[str, bytes],
    file_contents: FileContents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    relative, shard = {**_NEEDS_TEACHER, **_NEEDS_IMAGES}[kind]
    path = cache_copy / relative
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped" else b"")
    if kind in _NEEDS_IMAGES:
        monkeypatch.setattr(_sources, "load_teacher", None)
    times = {entry: entry.stat().st_mtime_ns for entry in cache_copy.rglob("*") if entry != path}
    result = repair(cache_copy)
    assert result.sound
    assert result.mended == (relative,)
    assert result.shards_redone == (shard,)
    assert file_contents(cache_copy) == sound
    untouched = {entry for entry in times if entry.is_file()}
    assert all(entry.stat().st_mtime_ns == times[entry] for entry in untouched)


@pytest.mark.parametrize("relative", _NEEDS_NOTHING)
@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_documents_are_restored_from_one_another(
    relative: str,
    damage: bytes | None,
    cache_copy: Path,
    repair: Callable[..., RepairResult],
    sound: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    (cache_copy / relative).unlink()
    if damage is not None:
        (cache_copy / relative).write_bytes(damage)
    result = repair(cache_copy, data_dir=None)
    assert result.mended == (relative,)
    assert not result.shards_redone
    assert file_contents(cache_copy) == sound


def test_the_cache_may_be_given_as_a_file_url(cache_copy: Path, sound_cache: Path) -> None:
    (cache_copy / "manifest.json").unlink()
    result = repair_cache(RepairConfig(cache=cache_copy.as_uri()))
    assert (result.sound, result.mended) == (True, ("manifest.json",))
    manifest = (sound_cache / "manifest.json").read_bytes()
    assert (cache_copy / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("table", ["witnesses", "tail"])
def test_tables_are_computed_again(
    table: str,
    cache_copy: Path,
    repair: Callable[..., RepairResult],
    sound: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    _one(cache_copy, f"tables/{table}-*").write_bytes(b"")
    assert repair(cache_copy).sound
    assert file_contents(cache_copy) == sound


def test_codec_tables_and_all_other_files_are_restored_at_once(
    tmp_path: Path,
    make_cache: Any,
    repair: Callable[..., RepairResult],
    file_contents: FileContents,
) -> None:
    """A third of all files, the manifest among them, each damaged in a way of its own."""
    root = tmp_path / "cache"
    make_cache(root, codec="transform", passes=1, stages=(4,))
    sound, chance = file_contents(root), random.Random(0)
    assert any("tables/stage4-" in name for name in sound)
    for name in sorted(sound):
        how = chance.choice(["flip", "cut", "remove"])
        if name != "plan.json" and ("tables/stage4" in name or chance.random() < 0.33):
            content = bytearray(sound[name])
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            kept = {"flip": content, "cut": content[: chance.randrange(len(content))]}
            (root / name).unlink()
            if how != "remove":
                (root / name).write_bytes(kept[how])
    (root / "manifest.json").write_bytes(b"")
    result = repair(root)
    assert result.sound
    assert file_contents(root) == sound
    assert repair(root).mended == ()


def test_swapped_files_are_restored(
    cache_copy: Path,
    repair: Callable[..., RepairResult],
    sound: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    for first, second in (("passes/0000", "passes/0001"), ("records/0000", "records/0001")):
        (cache_copy / first).rename(cache_copy / "aside")
        (cache_copy / second).rename(cache_copy / first)
        (cache_copy / "aside").rename(cache_copy / second)
    assert repair(cache_copy).sound
    assert file_contents(cache_copy) == sound


def test_swapped_plan_and_manifest_are_restored(
    cache_copy: Path,
    repair: Callable[..., RepairResult],
    sound: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    for name, other in (("manifest.json", "plan.json"), ("plan.json", "manifest.json")):
        (cache_copy / name).write_bytes(sound[other])
    assert repair(cache_copy, data_dir=None).sound
    assert file_contents(cache_copy) == sound


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_document_of_another_cache_is_replaced(
    name: str,
    cache_copy: Path,
    tmp_path: Path,
    make_cache: Any,
    repair: Callable[..., RepairResult],
    sound: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    make_cache(tmp_path / "other", seed=1, passes=1, stages=(4,))
    shutil.copy(tmp_path / "other" / name, cache_copy / name)
    assert repair(cache_copy).mended == (name,)
    assert file_contents(cache_copy) == sound


def test_unexpected_files_are_named_and_removed_on_request_only(
    cache_copy: Path,
    repair: Callable[..., RepairResult],
    sound: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    (cache_copy / "passes/0000/notes.txt").write_text("do not lose me")
    (cache_copy / "link").symlink_to("/etc/hostname")
    result = repair(cache_copy)
    assert not result.sound
    assert len(result.problems) == 2
    assert (cache_copy / "passes/0000/notes.txt").exists()
    result = repair(cache_copy, remove_extra=True)
    assert result.sound
    assert set(result.removed) == {"link", "passes/0000/notes.txt"}
    assert Path("/etc/hostname").exists()
    assert file_contents(cache_copy) == sound


def test_links_folders_and_pipes_instead_of_files_are_replaced(
    cache_copy: Path,
    tmp_path: Path,
    repair: Callable[..., RepairResult],
    sound: dict[str, bytes],
    file_contents: FileContents,
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    linked, folder, pipe = (cache_copy / f"passes/0000/pixel_hash/c/{n}" for n in range(3))
    for path in (linked, folder, pipe):
        path.unlink()
    (outside / "file").write_bytes(b"not ours")
    linked.symlink_to(outside / "file")
    folder.mkdir()
    os.mkfifo(pipe)
    shutil.move(cache_copy / "passes/0001/stage3", outside / "stage3")
    (cache_copy / "passes/0001/stage3").symlink_to(outside / "stage3")
    assert repair(cache_copy).sound
    assert file_contents(cache_copy) == sound
    assert (outside / "file").read_bytes() == b"not ours"


def test_bytes_that_differ_from_the_committed_ones_replace_nothing(
    cache_copy: Path,
    repair: Callable[..., RepairResult],
    file_contents: FileContents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that computes otherwise."""
    (cache_copy / "passes/0001/stage4/values/c/4/0/0").write_bytes(b"")
    before = file_contents(cache_copy)
    from scalekd.pipelines import _write_shards

    run = _write_shards.run_teacher

    def otherwise(*arguments: Any) -> Any:
        output = run(*arguments)
        output.features[4] *= 1.001
        return output

    monkeypatch.setattr(_write_shards, "run_teacher", otherwise)
    with pytest.raises(CacheMismatch, match=r"has other bytes.*torch computes otherwise"):
        repair(cache_copy)
    assert file_contents(cache_copy) == before


def test_a_shard_is_computed_again_and_verified_without_tf32(
    cache_copy: Path,
    tiny_images: Path,
    repair: Callable[..., RepairResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NVIDIA's containers switch TF32 on, with which the teacher would round otherwise."""
    from scalekd.pipelines import _write_shards, check_replay

    (cache_copy / "passes/0001/stage4/values/c/4/0/0").write_bytes(b"")
    seen: list[bool] = []
    run = _write_shards.run_teacher

    def noting(*arguments: Any) -> Any:
        seen.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        return run(*arguments)

    monkeypatch.setattr(_write_shards, "run_teacher", noting)
    monkeypatch.setattr(check_replay, "run_teacher", noting)
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        assert repair(cache_copy).sound
        assert all(backend.allow_tf32 for backend in backends)
        repaired = len(seen)
        sources = CacheSources(cache=cache_copy, data_dir=str(tiny_images), workers=0)
        assert check_replay.deep_verify(sources, 4).problems == ()
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
    assert 0 < repaired < len(seen)
    assert not any(seen)


def test_other_images_or_another_teacher_are_refused(
    cache_copy: Path,
    repair: Callable[..., RepairResult],
    image_set: Callable[..., Path],
    image_bytes: dict[int, bytes],
) -> None:
    (cache_copy / "passes/0001/stage4/values/c/4/0/0").write_bytes(b"")
    with pytest.raises(UsageError, match="--data-dir"):
        repair(cache_copy, data_dir=None)
    with pytest.raises(CacheMismatch, match="is not the image set"):
        repair(cache_copy, data_dir=str(image_set({**image_bytes, 3: image_bytes[4]})))
    with pytest.raises(CacheMismatch, match="another teacher: architecture"):
        repair(cache_copy, model="test_vit2")
    assert verify(cache_copy).problems


def test_a_folder_without_a_cache_is_not_repaired(
    tmp_path: Path, cache_copy: Path, repair: Callable[..., RepairResult]
) -> None:
    with pytest.raises(DataError, match="no such folder"):
        repair(tmp_path / "nowhere")
    for name in ("manifest.json", "plan.json"):
        (cache_copy / name).write_text(json.dumps({}))
    with pytest.raises(CacheCorrupt, match="neither plan nor manifest"):
        repair(cache_copy)
    shutil.rmtree(cache_copy / "records")
    for name in ("manifest.json", "plan.json"):
        (cache_copy / name).unlink()
    with pytest.raises((DataError, CacheError)):
        repair(cache_copy)
