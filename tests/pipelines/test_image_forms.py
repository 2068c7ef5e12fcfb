"""The same images as tar, table and folder: the same cache, and interchangeable in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.cache import open_cache
from scalekd.images import ImageDataset, ImageOptions, open_dataset
from scalekd.loading import CachedViewLoader
from scalekd.pipelines.train_student import train_student
from scalekd.training import TrainConfig

datasets = pytest.importorskip("datasets")
BY_ID = ImageOptions(key_column="id")
BY_PATH = ImageOptions(key_column="image/path")


@pytest.fixture
def tables(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``tiny_images`` as two parquet files, with the tars' keys and with paths of class folders."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    images = open_dataset(str(tiny_images))
    samples = list(images.read_many(range(len(images))))
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": s.image, "path": f"class {s.label}/{s.key}.jpg"} for s in samples],
            "label": [s.label for s in samples],
            "id": [s.key for s in samples],
        },
        features=datasets.Features(
            image=datasets.Image(),
            label=datasets.ClassLabel(names=list(images.class_names or ())),
            id=datasets.Value("string"),
        ),
    )
    for part in range(2):
        path = tmp_path / f"tables/data/train-{part:05d}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.shard(2, part, contiguous=True).to_parquet(str(path))
    return tmp_path / "tables"


def batches(root: Path, images: ImageDataset) -> list[dict[str, torch.Tensor]]:
    loader = CachedViewLoader(open_cache(root), images, batch_size=10, groups=("logits",))
    return list(loader.epoch(1))


def assert_same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_table_and_tars_of_the_same_images_give_the_same_cache(
    sound_cache: Path,
    tables: Path,
    tiny_images: Path,
    make_cache: Callable[..., Any],
    file_contents: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    assert make_cache(tmp_path / "cache", data_dir=str(tables), key_column="id").complete
    assert file_contents(tmp_path / "cache") == file_contents(sound_cache)
    images = open_dataset(str(tables), options=BY_ID)
    assert_same(batches(sound_cache, images), batches(sound_cache, open_dataset(str(tiny_images))))


def test_a_cache_of_folders_can_be_trained_from_the_table(
    tables: Path, tiny_images: Path, make_cache: Callable[..., Any], tmp_path: Path
) -> None:
    images = open_dataset(str(tiny_images))
    for sample in images.read_many(range(len(images))):
        path = tmp_path / f"folders/train/class {sample.label}/{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
    folders = open_dataset(str(tmp_path / "folders"))
    make_cache(tmp_path / "cache", data_dir=str(tmp_path / "folders"))
    of_table = open_dataset(str(tables), options=BY_PATH)
    assert of_table.class_names == folders.class_names
    assert_same(batches(tmp_path / "cache", of_table), batches(tmp_path / "cache", folders))


def test_images_without_labels_are_cached_like_any_other(
    tables: Path, make_cache: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"data_dir": str(tables), "key_column": "id", "passes": 1, "stages": ()}
    labelled = make_cache(tmp_path / "labelled", **options)
    plain = make_cache(tmp_path / "plain", labels="none", **options)
    assert labelled.num_samples == plain.num_samples == 70
    samples = [open_cache(tmp_path / name).samples for name in ("plain", "labelled")]
    assert (samples[0].labels == -1).all()
    assert sorted(samples[0].keys.tolist()) == sorted(samples[1].keys.tolist())
    # What labels the images have by now does not matter to a cache without any.
    images = open_dataset(str(tables), options=BY_ID)
    without, with_labels = (
        {
            name: torch.cat([batch[name] for batch in batches(tmp_path / cache, images)])
            for name in ("pixels", "label")
        }
        for cache in ("plain", "labelled")
    )
    assert (without["label"] == -1).all()
    # The order differs: labels showed that these tables are shuffled.
    ours, theirs = (
        sorted(view.numpy().tobytes() for view in part["pixels"]) for part in (without, with_labels)
    )
    assert ours == theirs


def test_validation_keeps_its_labels_where_training_ignores_its_own(
    sound_cache: Path, tiny_images: Path, tmp_path: Path
) -> None:
    result = train_student(
        TrainConfig(
            model="test_resnet",
            cache=str(sound_cache),
            data_dir=str(tiny_images),
            val_split="train-000001.tar",
            labels="none",
            objective="none",
            epochs=1,
            batch_size=10,
            workers=0,
            output=str(tmp_path / "run"),
        )
    )
    assert 0 <= result.metrics["eval_top1"] <= 100


def test_a_cache_of_sorted_tars_is_finished_in_the_order_it_was_begun_in(
    make_cache: Callable[..., Any],
    write_tar: Callable[..., Path],
    image_bytes: dict[int, bytes],
    file_contents: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Earlier releases took sorted samples as they came."""
    members: dict[str, bytes] = {}
    for number in range(600):
        members[f"{number:04d}.jpg"] = image_bytes[1 + number % 4]
        members[f"{number:04d}.cls"] = b"%d" % (number // 300)
    write_tar(tmp_path / "sorted/train-0.tar", members)
    options = {"data_dir": str(tmp_path / "sorted"), "stages": (), "shard_size": 256}
    with monkeypatch.context() as patch:
        patch.setattr("scalekd.images.samples.is_sorted_by_class", lambda labels: False)
        make_cache(tmp_path / "whole", passes=2, **options)
        make_cache(tmp_path / "cache", passes=1, **options)
    make_cache(tmp_path / "cache", passes=2, **options)
    assert file_contents(tmp_path / "cache") == file_contents(tmp_path / "whole")
    keys = open_cache(tmp_path / "cache").samples.keys
    assert keys.tolist() == sorted(keys.tolist())
    images = open_dataset(options["data_dir"])
    assert images.keys.tolist() != keys.tolist()
    assert len(batches(tmp_path / "cache", images)) == 60
