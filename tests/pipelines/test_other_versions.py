"""A cache that other versions of Pillow, NumPy or Python wrote grows and is repaired here.

What decides is whether this machine draws the same pixels, not what the versions are called.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from scalekd.cache import open_cache
from scalekd.cache.cache import Cache
from scalekd.cache.care.verify import verify
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Identity, Plan, ShardRecord
from scalekd.cache.files import FileDigest, digest
from scalekd.cache.writing.finishing import finish
from scalekd.cache.writing.planning import read_plan
from scalekd.errors import CacheMismatch
from scalekd.loading import drawing
from scalekd.pipelines._source_options import ExtendConfig, RepairConfig
from scalekd.pipelines.cache_teacher import CacheTeacherResult
from scalekd.pipelines.extend_cache import extend_cache
from scalekd.pipelines.repair_cache import repair_cache

Contents = Callable[[Path], dict[str, bytes]]
Change = Callable[[dict[str, Any]], None]

_OLDER = {"pillow": "11.0.0", "numpy": "2.0.1", "python": "3.10", "machine": "riscv64"}
_WITHOUT_PROVENANCE = ("plan.json", "manifest.json", "records/")


def _older(identity: dict[str, Any]) -> None:
    identity["views"]["environment"] |= _OLDER


def rewrite(root: Path, change: Change, files: dict[str, FileDigest] | None = None) -> None:
    """Change the identity of a cache, and every document that follows from it."""
    plan = read_plan(root)
    assert plan is not None
    identity = plan.identity.model_dump(mode="json")
    change(identity)
    forged = Plan.of(Identity.model_validate(identity), plan.provenance)
    (root / "plan.json").write_bytes(canonical(forged))
    num_passes = 1
    for path in root.glob("records/*/*.json"):
        record = ShardRecord.model_validate_json(path.read_bytes())
        changed = {name: (files or {}).get(name, found) for name, found in record.files.items()}
        update = {"cache_id": forged.cache_id, "files": changed}
        path.write_bytes(canonical(record.model_copy(update=update)))
        num_passes = max(num_passes, 0 if record.unit == "samples" else record.unit + 1)
    if (root / "manifest.json").exists():
        (root / "manifest.json").unlink()
        finish(Cache(root, forged), num_passes)


def change_pixel_hashes(root: Path, pass_index: int, shard: int) -> None:
    """Give a shard the hashes of other pixels, as if another decoder had drawn it."""
    path = f"passes/{pass_index:04d}/pixel_hash/c/{shard}"
    other = f"passes/{pass_index:04d}/pixel_hash/c/{(shard + 1) % 2}"
    shutil.copy(root / other, root / path)
    rewrite(root, _older, {path: digest((root / path).read_bytes())})


def change_witnesses(root: Path) -> None:
    """Give the cache witnesses that differ by one level in one pixel."""
    plan = read_plan(root)
    assert plan is not None
    pixels = safetensors.numpy.load((root / plan.identity.views.witnesses).read_bytes())["pixels"]
    pixels = pixels.copy()
    pixels[2, 3, 4, 1] ^= 1
    content = safetensors.numpy.save({"pixels": pixels})

    def change(identity: dict[str, Any]) -> None:
        _older(identity)
        found = digest(content)
        name = f"tables/witnesses-{found.sha256[:16]}.safetensors"
        (root / name).write_bytes(content)
        identity["views"]["witnesses"] = name
        identity["views"]["witnesses_digest"] = found.model_dump(mode="json")

    rewrite(root, change)


@pytest.fixture(params=["zarr", "webdataset"])
def older(
    request: pytest.FixtureRequest,
    cache_copy: Path,
    make_cache: Callable[..., Any],
    tmp_path: Path,
) -> Path:
    """``sound_cache``, in each form, as older versions would have written it."""
    if request.param == "webdataset":
        cache_copy = tmp_path / "tars"
        make_cache(cache_copy, format="webdataset", embed="view")
    rewrite(cache_copy, _older)
    assert verify(cache_copy).problems == []
    return cache_copy


@pytest.fixture
def extend(tiny_images: Path) -> Callable[..., CacheTeacherResult]:
    def extend(cache: Path, **changes: Any) -> CacheTeacherResult:
        settings: dict[str, Any] = {"data_dir": str(tiny_images), "workers": 0, **changes}
        return extend_cache(ExtendConfig(cache=cache, **settings))

    return extend


def _data(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {
        path: content
        for path, content in contents.items()
        if not path.startswith(_WITHOUT_PROVENANCE)
    }


def test_the_same_command_adds_passes(
    older: Path, make_cache: Callable[..., Any], file_contents: Contents, tmp_path: Path
) -> None:
    form = {"format": "webdataset", "embed": "view"} if older.name == "tars" else {}
    before = file_contents(older)
    result = make_cache(older, passes=3, **form)
    assert (result.complete, result.shards_found, result.shards_written) == (True, 6, 3)
    after = file_contents(older)
    assert before.keys() <= after.keys()
    assert {p for p in before if after[p] != before[p]} == {"manifest.json"}
    assert verify(older).problems == []
    make_cache(tmp_path / "now", passes=3, **form)
    assert _data(after) == _data(file_contents(tmp_path / "now"))


def test_extend_adds_passes_and_a_second_teacher(
    older: Path, extend: Callable[..., CacheTeacherResult]
) -> None:
    assert extend(older, passes=3).complete
    other = {"model": "test_vit2", "pretrained": False, "model_kwargs": {"num_classes": 10}}
    for passes in (1, 3):  # begun, and then grown
        assert extend(older, name="other", passes=passes, **other).complete
    assert extend(older, name="int8", stages=(4,), codec="int8").complete
    assert verify(older).problems == []
    views = open_cache(older).identity.views
    for name in ("other", "int8"):  # any reader of format 1 asks that the views be the cache's
        assert open_cache(older / "extensions" / name).identity.views == views


def test_an_unfinished_cache_is_finished(
    older: Path, make_cache: Callable[..., Any], file_contents: Contents
) -> None:
    form = {"format": "webdataset", "embed": "view"} if older.name == "tars" else {}
    complete = file_contents(older)
    for lost in ("manifest.json", "records/0001/000001.json", "records/0000/000002.json"):
        (older / lost).unlink()
    assert make_cache(older, **form).shards_written == 2
    assert file_contents(older) == complete


def test_repair_restores_lost_files(
    older: Path, tiny_images: Path, file_contents: Contents
) -> None:
    complete = file_contents(older)
    plan = read_plan(older)
    assert plan is not None
    (older / plan.identity.views.witnesses).unlink()
    for path in sorted(older.glob("passes/0001/**/*"))[-3:]:
        if path.is_file():
            path.unlink()
    # Neither a record nor the manifest says any more what these bytes were.
    (older / "records/0000/000001.json").unlink()
    (older / "manifest.json").unlink()
    result = repair_cache(RepairConfig(cache=older, data_dir=str(tiny_images), workers=0))
    assert result.sound
    assert file_contents(older) == complete


# Other pixels


def _other_hashes(root: Path) -> None:
    change_pixel_hashes(root, 1, 1)


@pytest.mark.parametrize("change", [_other_hashes, change_witnesses])
def test_a_cache_of_other_pixels_is_refused_before_the_teacher_runs(
    change: Callable[[Path], None],
    cache_copy: Path,
    make_cache: Callable[..., Any],
    extend: Callable[..., CacheTeacherResult],
    file_contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(cache_copy)
    before = file_contents(cache_copy)
    from scalekd.teachers import Teacher

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Teacher, "forward", refuse)
    named = {"name": "other", "model": "test_vit2", "pretrained": False}
    for work in (
        lambda: make_cache(cache_copy, passes=3),
        lambda: extend(cache_copy, passes=3),
        lambda: extend(cache_copy, **named),
    ):
        with pytest.raises(CacheMismatch, match="differen") as caught:
            work()
        message = str(caught.value)
        assert "pillow 11.0.0 (here " in message
        assert "python 3.10 (here " in message
        assert "install those versions" in message
        assert "\n" not in message
    assert file_contents(cache_copy) == before


def test_the_same_versions_are_not_drawn_again(
    cache_copy: Path, make_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = drawing.DrawnViews.draw

    def counting(self: Any, request: Any) -> Any:
        drawn.append(request.pass_index)
        return draw(self, request)

    monkeypatch.setattr(drawing.DrawnViews, "draw", counting)
    make_cache(cache_copy)
    assert drawn == []
    rewrite(cache_copy, _older)
    make_cache(cache_copy)
    assert set(drawn) == {0, 1}  # of every pass
    assert len(drawn) >= 48


def test_repair_without_records_refuses_other_pixels(
    cache_copy: Path, tiny_images: Path, file_contents: Contents
) -> None:
    change_witnesses(cache_copy)
    (cache_copy / "manifest.json").unlink()
    (cache_copy / "records/0001/000001.json").unlink()
    before = file_contents(cache_copy)
    with pytest.raises(CacheMismatch, match=r"witness views .* pillow 11\.0\.0 \(here "):
        repair_cache(RepairConfig(cache=cache_copy, data_dir=str(tiny_images), workers=0))
    assert file_contents(cache_copy) == before


def test_other_images_are_not_blamed_on_versions(
    cache_copy: Path,
    make_cache: Callable[..., Any],
    image_bytes: dict[int, bytes],
    image_set: Callable[..., Path],
) -> None:
    """Same keys, same sizes, other bytes."""
    rewrite(cache_copy, _older)
    png = image_bytes[0]
    other = image_set({**image_bytes, 0: png[:-12] + bytes(12)})
    with pytest.raises(CacheMismatch, match="another image than the one the teacher saw"):
        make_cache(cache_copy, data_dir=str(other), passes=3)


def test_corrupt_images_that_were_left_out_do_not_shift_the_comparison(
    tmp_path: Path,
    make_cache: Callable[..., Any],
    image_bytes: dict[int, bytes],
    image_set: Callable[..., Path],
) -> None:
    data = image_set({**image_bytes, 1: b"no image", 30: b"no image"})
    job = {"data_dir": str(data), "skip_corrupt": True}
    make_cache(tmp_path / "cache", passes=1, **job)
    rewrite(tmp_path / "cache", _older)
    assert make_cache(tmp_path / "cache", passes=2, **job).complete
    assert np.isin(
        ["sample-001", "sample-030"], open_cache(tmp_path / "cache").manifest.skipped
    ).all()
