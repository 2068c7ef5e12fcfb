"""Views of embedded images have the same pixels, or an error is raised."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.forms import IMAGE
from scalekd.cache.layout import DIFFERENCES
from scalekd.cache.reading.reader import CacheReader
from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.images import ImageDataset, open_dataset
from scalekd.loading import CachedViewLoader, open_images
from scalekd.loading.embedded import EmbeddedImages
from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache
from scalekd.training.feed import on_device
from scalekd.views import encode_view

GROUPS = ("stage4", "logits")


@pytest.fixture(scope="module")
def caches(
    recorded: Any, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One cache in every form; of every augmentation. Read only."""
    folder = tmp_path_factory.mktemp("forms")
    found = {"zarr": recorded.root}
    for name in ("none", "source", "view", "pixels", "zarr-pixels"):
        embed = name.removeprefix("zarr-")
        found[name] = folder / name
        convert_cache(
            ConvertConfig(
                source=str(recorded.root),
                output=str(found[name]),
                format="zarr" if name.startswith("zarr") else "webdataset",
                embed=embed,
                data_dir=str(tiny_images) if embed != "none" else None,
                workers=0,
            )
        )
    return found


def loader(root: Path, images: ImageDataset | None, **options: Any) -> CachedViewLoader:
    settings = {"batch_size": 7, "groups": GROUPS, "seed": 5, **options}
    return CachedViewLoader(open_cache(root), images, **settings)


@pytest.mark.parametrize("form", ["none", "source", "view", "pixels", "zarr-pixels"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_zarr_form(
    caches: dict[str, Path], tiny_images: Path, form: str, num_workers: int
) -> None:
    images = open_dataset(str(tiny_images))
    theirs = loader(caches["zarr"], images)
    ours = loader(caches[form], images if form == "none" else None, num_workers=num_workers)
    for epoch in (0, 1):
        for there, here in zip(theirs.epoch(epoch), ours.epoch(epoch), strict=True):
            assert there.keys() == here.keys()
            for name in there:
                assert there[name].dtype == here[name].dtype
                np.testing.assert_array_equal(there[name].numpy(), here[name].numpy())


def test_at_another_size_views_are_drawn_from_images_and_never_from_views(
    caches: dict[str, Path], tiny_images: Path
) -> None:
    images = open_dataset(str(tiny_images))
    expected = next(loader(caches["zarr"], images, view_size=(24, 24)).epoch(0))["pixels"]
    for form, given in (("source", None), ("view", images), ("zarr-pixels", images)):
        found = next(loader(caches[form], given, view_size=(24, 24)).epoch(0))["pixels"]
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
    for form in ("view", "pixels", "zarr-pixels"):
        with pytest.raises(UsageError, match="32 x 32 pixels, and the student takes 24 x 24"):
            loader(caches[form], None, view_size=(24, 24))
    for form in ("zarr", "none"):
        with pytest.raises(UsageError, match="--data-dir is missing"):
            loader(caches[form], None)


def test_the_embedded_image_set_equals_the_original(
    caches: dict[str, Path], tiny_images: Path
) -> None:
    there, here = open_dataset(str(tiny_images)), open_images(str(caches["source"]))
    assert here.fingerprint == there.fingerprint
    assert here.class_names == there.class_names
    for number in (0, 23, 24, 69):
        assert here[number] == there[number]
    for form in ("none", "view", "pixels", "zarr-pixels"):
        with pytest.raises(UsageError, match="no encoded images"):
            EmbeddedImages.of(open_cache(caches[form]))


def test_swapped_images_and_edited_views_are_noticed(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write all digests can swap images; the hashes of images and pixels tell."""
    read_rows = CacheReader.read_rows

    def swapped(self: CacheReader, *arguments: Any) -> dict[str, np.ndarray]:
        rows = read_rows(self, *arguments)
        if IMAGE in rows and len(rows[IMAGE]) > 1:
            rows[IMAGE] = rows[IMAGE][::-1]
        return rows

    views = [loader(caches[form], None) for form in ("source", "view")]
    monkeypatch.setattr(CacheReader, "read_rows", swapped)
    for found, message in zip(views, ("is another image", "redraws a view"), strict=True):
        with pytest.raises(CacheMismatch, match=message):
            list(found.epoch(0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (encode_view(np.zeros((16, 32, 3), np.uint8)), "16 x 32 pixels, not 32 x 32"),
        (b"RIFF no image", "does not decode"),
    ],
)
def test_invalid_embedded_views_are_refused(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, image: bytes, message: str
) -> None:
    found = loader(caches["view"], None)
    monkeypatch.setattr(found.views, "_embedded_sample", _given(image))
    with pytest.raises(CacheCorrupt, match=message):
        list(found.epoch(0))


def _given(image: bytes) -> Callable[..., Any]:
    from scalekd.images import Sample

    return lambda index, _: Sample(str(index), image, 0)


def test_a_damaged_tar_stops_training(caches: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(caches["view"], tmp_path / "cache"))
    path = root / "passes/0000/000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorrupt, match=r"passes/0000/000001\.tar"):
        list(loader(root, None).epoch(0))


@pytest.mark.parametrize("form", ["pixels", "zarr-pixels"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_differences_are_restored_on_the_device_to_the_same_pixels(
    caches: dict[str, Path], form: str, num_workers: int
) -> None:
    whole = loader(caches[form], None)
    parts = loader(caches[form], None, differences=True, num_workers=num_workers)
    on_cpu = on_device(parts.epoch(1), torch.device("cpu"))
    for there, batch in zip(whole.epoch(1), on_cpu, strict=True):
        assert there.keys() == batch.keys()
        for name in there:
            np.testing.assert_array_equal(there[name].numpy(), batch[name].numpy())
    assert "pixels" not in next(loader(caches[form], None, differences=True).epoch(0))
    images = loader(caches["source"], None, differences=True)  # drawn, whatever is asked
    assert "differences" not in next(images.epoch(0))


@pytest.mark.parametrize("form", ["pixels", "zarr-pixels"])
@pytest.mark.parametrize("differences", [False, True])
def test_pixels_with_another_hash_stop_training_and_are_reported_by_verify(
    caches: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    differences: bool,
) -> None:
    """An author who writes all digests can change pixels; their hashes show it."""
    found = loader(caches[form], None, differences=differences)
    _change_pixels(monkeypatch)
    with pytest.raises(CacheCorrupt, match=r"pixels of a view of sample .* not those that the"):
        list(found.epoch(0))
    assert not verify(caches["view"]).problems
    problems = verify(caches[form]).problems
    assert len(problems) > 1
    assert all("do not have their pixel hash" in problem for problem in problems)


def test_later_batches_check_every_view_or_one_in_a_hundred(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (loader(caches["pixels"], None, differences=d) for d in (False, True))
    monkeypatch.setattr("scalekd.loading.cached_views.CHECKED_BATCHES", 0)
    monkeypatch.setattr("scalekd.loading.cached_views.is_checked", lambda sample, epoch: False)
    _change_pixels(monkeypatch)
    assert len(list(parts.epoch(0))) == parts.num_batches
    with pytest.raises(CacheCorrupt, match="not those that the teacher saw"):
        list(whole.epoch(0))
    monkeypatch.setattr("scalekd.loading.cached_views.is_checked", lambda s, e: s == 40 and e == 3)
    list(parts.epoch(1))
    with pytest.raises(CacheCorrupt, match="sample sample-040"):
        list(parts.epoch(3))


def _change_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the first difference of every view by one."""
    read_rows = CacheReader.read_rows

    def changed(self: CacheReader, *arguments: Any) -> dict[str, np.ndarray]:
        rows = read_rows(self, *arguments)
        if DIFFERENCES in rows:
            rows[DIFFERENCES][:, 0, 0, 0] += 1
        return rows

    monkeypatch.setattr(CacheReader, "read_rows", changed)
