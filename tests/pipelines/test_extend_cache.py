"""Adding to a cache: what stands stays to the byte, what is added fits, and training finds it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.images import open_dataset
from scalekd.pipelines._source_options import ExtendConfig
from scalekd.pipelines.cache_teacher import CacheTeacherResult
from scalekd.pipelines.extend_cache import extend_cache

Extend = Callable[..., CacheTeacherResult]
Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def extend(cache_copy: Path, tiny_images: Path) -> Extend:
    """Extends ``cache_copy``."""

    def extend(**changes: Any) -> CacheTeacherResult:
        settings: dict[str, Any] = {
            "cache": cache_copy,
            "data_dir": str(tiny_images),
            "workers": 0,
            **changes,
        }
        return extend_cache(ExtendConfig(**settings))

    return extend


OTHER = {
    "name": "other",
    "model": "test_vit2",
    "pretrained": False,
    "model_kwargs": {"num_classes": 10},
}


def test_passes_are_added_without_changing_existing_files(
    extend: Extend, cache_copy: Path, file_contents: Contents, make_cache: Any, tmp_path: Path
) -> None:
    before = file_contents(cache_copy)
    result = extend(passes=3)
    assert (result.complete, result.shards_written, result.num_passes) == (True, 3, 3)
    after = file_contents(cache_copy)
    assert {path for path in before if after[path] != before[path]} == {"manifest.json"}
    make_cache(tmp_path / "at-once", passes=3)
    assert file_contents(tmp_path / "at-once") == after  # as if it had been asked for at once


def test_a_second_teacher_does_not_change_the_cache(
    extend: Extend, cache_copy: Path, file_contents: Contents
) -> None:
    before = file_contents(cache_copy)
    assert extend(**OTHER).complete
    after = file_contents(cache_copy)
    assert {path: after[path] for path in before} == before
    assert all(path.startswith("extensions/other/") for path in after.keys() - before.keys())
    assert verify(cache_copy).problems == []
    base, other = open_cache(cache_copy), open_cache(cache_copy / "extensions/other")
    assert other.identity.teacher["architecture"] == "test_vit2"
    assert (other.identity.logits is not None, other.identity.stages) == (True, {})
    for unit in range(2):
        hashes = [reader.read_rows(unit, 0, 8, ["pixel_hash"]) for reader in (base, other)]
        assert np.array_equal(*(rows["pixel_hash"] for rows in hashes))


def test_stages_of_the_same_teacher_are_added(
    make_cache: Any, extend: Extend, cache_copy: Path, tmp_path: Path, sound_cache: Path
) -> None:
    """Logits now, features later: they are those that one job would have written."""
    lean = tmp_path / "lean"
    make_cache(lean, stages=())
    result = extend(cache=lean, name="features", stages=(3, 4), codec="float16")
    assert result.complete
    added, whole = open_cache(lean / "extensions/features"), open_cache(sound_cache)
    for name in ("stage3/values", "stage4/values"):
        found = [reader.read_rows(1, 24, 8, [name])[name] for reader in (added, whole)]
        assert np.array_equal(*found)
    assert added.identity.logits is None


def test_a_teacher_without_a_classifier_gives_its_features(
    extend: Extend, cache_copy: Path
) -> None:
    assert extend(**OTHER | {"model_kwargs": {"num_classes": 0}}).complete
    other = open_cache(cache_copy / "extensions/other").identity
    assert (other.logits, set(other.stages)) == (None, {"4"})


def test_an_interrupted_extension_is_continued(extend: Extend, cache_copy: Path) -> None:
    first = extend(**OTHER, passes=1, shards=(0, 1))
    assert not first.complete
    rest = extend(**OTHER, passes=1)
    assert (rest.complete, rest.shards_written) == (True, 1)
    grown = extend(name="other", passes=2)  # teacher and all else are read from its plan
    assert (grown.complete, grown.shards_written) == (True, 3)
    assert open_cache(cache_copy / "extensions/other").num_passes == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to add"),
        ({"passes": 1}, "has 2 already"),
        ({"stages": (4,)}, "give --name"),
        ({"name": "x"}, "nothing to keep"),
        ({**OTHER, "stages": (), "logits": "none"}, "--stages none and --logits none keep nothing"),
        ({"name": "../x", "logits": "full"}, "cannot name an extension"),
        ({"name": "base", "logits": "full"}, "the cache itself"),
        ({"name": "x", "logits": "full", "passes": 3}, "an extension has views of the cache only"),
    ],
)
def test_contradictory_options_are_refused(
    extend: Extend, cache_copy: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        extend(**changes)
    assert not (cache_copy / "extensions").exists()


def test_samples_may_have_moved_to_other_shards(
    extend: Extend,
    cache_copy: Path,
    tiny_images: Path,
    write_tar: Callable[..., Path],
    file_contents: Contents,
    make_cache: Any,
    tmp_path: Path,
) -> None:
    images = open_dataset(str(tiny_images))
    moved = np.random.default_rng(0).permutation(len(images))
    for number, part in enumerate(np.array_split(moved, 3)):
        members = {}
        for sample in images.read_many(part.tolist()):
            members |= {
                f"{sample.key}.jpg": sample.image,
                f"{sample.key}.cls": b"%d" % sample.label,
            }
        write_tar(tmp_path / f"moved/train-{number}.tar", members)
    (tmp_path / "moved/classes.txt").write_text("\n".join(images.class_names or ()))
    assert open_dataset(str(tmp_path / "moved")).keys.tolist() != images.keys.tolist()
    assert extend(passes=3, data_dir=str(tmp_path / "moved")).complete
    make_cache(tmp_path / "at-once", passes=3)
    assert file_contents(tmp_path / "at-once") == file_contents(cache_copy)
    members |= {f"{sample.key}.cls": b"%d" % ((sample.label + 1) % 10)}
    write_tar(tmp_path / "moved/train-2.tar", members)
    with pytest.raises(CacheMismatch, match=r"or other keys, labels, sizes or order"):
        extend(passes=4, data_dir=str(tmp_path / "moved"))


def test_other_images_are_refused(
    extend: Extend, cache_copy: Path, image_set: Any, image_bytes: dict[int, bytes]
) -> None:
    others = image_set({number: image_bytes[number] for number in range(40)})
    with pytest.raises(CacheMismatch, match=r"not the image set .* 40 samples here, 70 there"):
        extend(**OTHER, data_dir=str(others))
    assert not (cache_copy / "extensions/other/plan.json").exists()


def test_swapped_images_are_refused_shard_by_shard(
    extend: Extend, cache_copy: Path, image_set: Any, image_bytes: dict[int, bytes]
) -> None:
    """The fingerprint tells keys, labels and sizes; a flipped byte only the samples' hash tells."""
    broken = bytearray(image_bytes[51])
    broken[-40] ^= 1
    others = image_set({**image_bytes, 51: bytes(broken)})
    with pytest.raises(CacheMismatch, match="other samples"):
        extend(**OTHER, data_dir=str(others))
    assert not list((cache_copy / "extensions/other/records/0000").glob("000002.json"))


def test_other_pixels_are_refused_before_the_shard_is_committed(
    extend: Extend, cache_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalekd.loading import drawing

    real = drawing.draw_view

    def drifted(sample: Any, *arguments: Any, **settings: Any) -> Any:
        view = real(sample, *arguments, **settings)
        if sample.key != "sample-060":
            return view
        return type(view)(view.params, view.pixels, view.pixel_hash ^ 1)

    monkeypatch.setattr(drawing, "draw_view", drifted)
    with pytest.raises(CacheMismatch, match="draws other pixels"):
        extend(**OTHER)
    committed = sorted(
        p.name for p in (cache_copy / "extensions/other/records/0000").glob("*.json")
    )
    assert committed == ["000000.json", "000001.json"]


def test_the_same_weights_by_another_name_add_passes(extend: Extend) -> None:
    assert extend(passes=3, model="test_vit").num_passes == 3


def test_another_teacher_cannot_add_passes(extend: Extend) -> None:
    with pytest.raises(
        CacheMismatch, match=r"another teacher: architecture is test_vit in the cache"
    ):
        extend(passes=3, model="test_vit2")


def test_verify_looks_into_extensions(extend: Extend, cache_copy: Path) -> None:
    extend(**OTHER)
    chunk = next((cache_copy / "extensions/other/passes/0000/logits").rglob("c/0/0"))
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    assert any("extensions/other" in problem for problem in verify(cache_copy).problems)


def test_an_extension_of_another_cache_is_refused(
    extend: Extend, cache_copy: Path, make_cache: Any, tmp_path: Path
) -> None:
    make_cache(tmp_path / "stranger", seed=1, passes=1)
    shutil.copytree(tmp_path / "stranger", cache_copy / "extensions/stranger")
    assert any("views.seed" in problem for problem in verify(cache_copy).problems)


def test_licence_and_note_of_an_extension_are_its_own(extend: Extend, cache_copy: Path) -> None:
    extend(**OTHER, licence="cc-by-nc-4.0", note="for the seminar")
    told = open_cache(cache_copy / "extensions/other").manifest.plan.provenance
    assert (told.licence, told.note) == ("cc-by-nc-4.0", "for the seminar")
    assert open_cache(cache_copy).manifest.plan.provenance.licence is None


@pytest.mark.parametrize(
    "changed",
    [{"stages": (4,)}, {"logits": "topk:2"}, {"codec": "int8"}, {"licence": "mit"}, {"note": "x"}],
)
def test_options_of_an_extension_cannot_be_changed_later(
    extend: Extend, changed: dict[str, Any]
) -> None:
    begun = {"name": "x", "stages": (3, 4), "logits": "full", "codec": "float16", "passes": 1}
    assert extend(**begun, licence="cc0", note="one", shards=(0, 0)).shards_written == 1
    with pytest.raises(CacheMismatch, match=f"--{next(iter(changed))}: .*was begun with"):
        extend(**{"name": "x", "passes": 1, **changed})
    again = begun | {"stages": (4, 3)}
    assert extend(**again, licence="cc0", note="one").complete


def test_extending_a_missing_cache_is_a_data_error(extend: Extend, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        extend(cache=tmp_path / "nothing", passes=2)


def test_passes_are_added_to_tars(
    extend: Extend, make_cache: Any, tmp_path: Path, file_contents: Contents
) -> None:
    tars = tmp_path / "tars"
    form = {"format": "webdataset", "embed": "source", "limit": 30, "stages": (4,)}
    make_cache(tars, passes=1, **form)
    assert extend(cache=tars, passes=2).complete
    assert extend(cache=tars, **OTHER).complete
    assert verify(tars).problems == []
    make_cache(tmp_path / "at-once", passes=2, **form)
    kept = file_contents(tars)
    own = {path: kept[path] for path in kept if not path.startswith("extensions/")}
    assert own == file_contents(tmp_path / "at-once")


def test_passes_are_added_with_the_filter_that_the_cache_was_begun_with(
    make_cache: Callable[..., Any], tiny_images: Path, file_contents: Contents, tmp_path: Path
) -> None:
    settings = {"interpolation": "bilinear-opencv", "stages": ()}
    make_cache(tmp_path / "cache", passes=1, **settings)
    extend_cache(
        ExtendConfig(cache=tmp_path / "cache", data_dir=str(tiny_images), passes=2, workers=0)
    )
    make_cache(tmp_path / "at-once", passes=2, **settings)
    assert file_contents(tmp_path / "at-once") == file_contents(tmp_path / "cache")
    assert open_cache(tmp_path / "cache").policy.interpolation == "bilinear-opencv"


def test_a_cache_is_finished_with_its_own_filter_only(
    make_cache: Callable[..., Any], tmp_path: Path
) -> None:
    make_cache(tmp_path / "cache", passes=1, stages=())
    with pytest.raises(CacheMismatch, match="interpolation"):
        make_cache(tmp_path / "cache", passes=2, stages=(), interpolation="bilinear")


def test_the_cache_may_be_given_as_a_file_url(extend: Extend, cache_copy: Path) -> None:
    result = extend(cache=cache_copy.as_uri(), passes=3)
    assert (result.complete, result.num_passes) == (True, 3)
    assert open_cache(cache_copy).num_passes == 3


def test_only_a_folder_can_be_extended(extend: Extend, web: Any, cache_copy: Path) -> None:
    shutil.copytree(cache_copy, web.root / "cache")
    with pytest.raises(UsageError, match="only a folder can be extended; fetch the cache"):
        extend(cache=f"{web.url}/cache", passes=3)
