"""Epochs after the last cached pass draw new views for a live teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalekd.cache import open_cache
from scalekd.errors import CacheMismatch, UsageError
from scalekd.images import open_dataset
from scalekd.loading import CachedViewLoader
from scalekd.loading.cached_views import fresh_pass

AUGMENTATION = "crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.5"
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def caches(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two passes of five in every form; and all five, to compare with. Read only."""
    folder = tmp_path_factory.mktemp("fresh")
    forms: dict[str, dict[str, Any]] = {
        "zarr": {},
        "none": {"format": "webdataset"},
        "source": {"format": "webdataset", "embed": "source"},
        "view": {"format": "webdataset", "embed": "view"},
    }
    for name, form in {**forms, "five": {"passes": 5}}.items():
        make_cache(folder / name, stages=(), logits="topk:2", aug=AUGMENTATION, **form)
    return {path.name: path for path in folder.iterdir()}


def loader(root: Path, images: Path | None, **options: Any) -> CachedViewLoader:
    opened = None if images is None else open_dataset(str(images))
    return CachedViewLoader(open_cache(root), opened, **{"batch_size": 7, "seed": 5, **options})


def pixels(batches: Any, name: str = "pixels") -> Tensor:
    return torch.cat([batch[name] for batch in batches])


@pytest.mark.parametrize("form", ["zarr", "none", "source", "view"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_fresh_views_are_those_of_a_cache_with_more_passes(
    caches: dict[str, Path], tiny_images: Path, form: str, num_workers: int
) -> None:
    theirs = loader(caches["five"], tiny_images)
    ours = loader(
        caches[form],
        None if form == "source" else tiny_images,
        fresh_views=True,
        num_workers=num_workers,
    )
    for epoch in (1, 2, 4, 0):
        for there, here in zip(theirs.epoch(epoch), ours.epoch(epoch), strict=True):
            assert there.keys() == here.keys() == {"pixels", "label"}
            assert torch.equal(there["label"], here["label"])
            assert torch.equal(there["pixels"], here["pixels"])


def test_without_fresh_views_passes_are_read_again(
    caches: dict[str, Path], tiny_images: Path
) -> None:
    again = loader(caches["zarr"], tiny_images)
    fresh = loader(caches["zarr"], tiny_images, fresh_views=True)
    assert torch.equal(pixels(again.epoch(1)), pixels(fresh.epoch(1)))
    assert not torch.equal(pixels(again.epoch(3)), pixels(fresh.epoch(3)))
    assert not torch.equal(pixels(fresh.epoch(3)), pixels(fresh.epoch(5)))


def test_a_teacher_receives_fresh_views_at_its_own_size(
    caches: dict[str, Path], tiny_images: Path
) -> None:
    options = {"view_size": (48, 40), "teacher_pixels": True}
    theirs = loader(caches["five"], tiny_images, **options)
    ours = loader(caches["zarr"], tiny_images, fresh_views=True, **options)
    for name, size in (("pixels", (48, 40)), ("teacher_pixels", (32, 32))):
        here = pixels(ours.epoch(3), name)
        assert here.shape[2:] == size
        assert torch.equal(pixels(theirs.epoch(3), name), here)


def test_an_epoch_of_fresh_views_can_start_in_the_middle(
    caches: dict[str, Path], tiny_images: Path
) -> None:
    ours = loader(caches["zarr"], tiny_images, fresh_views=True)
    whole = list(ours.epoch(4))
    rest = list(ours.epoch(4, start_batch=6))
    assert len(rest) == len(whole) - 6
    assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(whole[6:], rest, strict=True))


def test_a_cache_that_embeds_views_needs_images_for_fresh_views(
    caches: dict[str, Path], tiny_images: Path
) -> None:
    with pytest.raises(UsageError, match=r"contains the views of 2 passes.*pass --data-dir"):
        loader(caches["view"], None, fresh_views=True)
    loader(caches["view"], None)


def test_images_that_changed_are_refused(
    caches: dict[str, Path], image_bytes: dict[int, bytes], image_set: Callable[..., Path]
) -> None:
    """The student would learn other images than those that the cache's labels are of."""
    swapped = {**image_bytes, 60: image_bytes[50]}
    ours = loader(caches["zarr"], image_set(swapped), fresh_views=True)
    with pytest.raises(CacheMismatch, match="sample-060 is another image"):
        list(ours.epoch(2))


def test_fresh_views_of_a_part_follow_its_last_pass() -> None:
    assert [fresh_pass((0, 1), epoch) for epoch in range(4)] == [None, None, 2, 3]
    assert [fresh_pass((3, 7), epoch) for epoch in range(4)] == [None, None, 8, 9]


def test_fresh_views_have_no_cached_targets(caches: dict[str, Path], tiny_images: Path) -> None:
    with pytest.raises(ValueError, match="no cached targets"):
        loader(caches["zarr"], tiny_images, fresh_views=True, groups=("logits",))
