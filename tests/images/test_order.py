"""Samples sorted by class are mixed; shuffled ones keep their order."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import xxhash

from scalekd.images import open_dataset
from scalekd.images.order import is_sorted_by_class

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]


def shuffled(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(labels)


def grouped(num_classes: int, each: int) -> np.ndarray:
    return np.repeat(np.arange(num_classes), each)


@pytest.mark.parametrize(
    ("num_classes", "each"), [(10, 256), (2, 5000), (1000, 50), (1000, 3), (3, 200), (100, 130)]
)
def test_sorted_classes_are_noticed_and_shuffled_ones_are_not(num_classes: int, each: int) -> None:
    labels = grouped(num_classes, each)
    assert is_sorted_by_class(labels)
    assert is_sorted_by_class(labels[::-1])
    assert not any(is_sorted_by_class(shuffled(labels, seed)) for seed in range(20))


def test_shards_of_a_few_classes_each_are_sorted_although_each_is_shuffled() -> None:
    labels = np.concatenate([shuffled(grouped(10, 200) + first) for first in range(0, 100, 10)])
    assert is_sorted_by_class(labels)


@pytest.mark.parametrize(
    "labels",
    [
        grouped(1, 5000),  # one class: no order mixes it
        grouped(10, 25),  # all of it lies in one block
        np.tile(np.arange(10), 500),  # in turn: each block has every class
        np.arange(5000),  # as many classes as samples
        np.where(np.arange(1024) < 1, 1, 0),  # one sample of a rare class
    ],
)
def test_orders_that_a_shuffle_would_not_improve_are_kept(labels: np.ndarray) -> None:
    assert not is_sorted_by_class(labels)


def test_rare_classes_raise_no_false_alarm() -> None:
    """4 samples of a class among 1,024: in three of ten sets they miss two of the four blocks."""
    labels = np.where(np.arange(1024) < 4, 1, 0)
    assert not any(is_sorted_by_class(shuffled(labels, seed)) for seed in range(300))


def test_a_long_tail_that_is_sorted_is_noticed() -> None:
    counts = [5000 // rank for rank in range(1, 60)]
    labels = np.repeat(np.arange(len(counts)), counts)
    assert is_sorted_by_class(labels)
    assert not any(is_sorted_by_class(shuffled(labels, seed)) for seed in range(20))


def members(labels: np.ndarray, *, with_labels: bool = True) -> dict[str, bytes]:
    found = {}
    for number, label in enumerate(labels.tolist()):
        found[f"{number:05d}.jpg"] = b"x"
        if with_labels:
            found[f"{number:05d}.cls"] = b"%d" % label
    return found


def test_a_sorted_tar_is_mixed_and_says_so(tmp_path: Path, write_tar: WriteTar) -> None:
    labels = grouped(10, 256)
    write_tar(tmp_path / "train-0.tar", members(labels))
    images = open_dataset(str(tmp_path))
    assert images.notes == (
        f"{tmp_path}/train-*.tar: is sorted by class, so its samples are taken in an order that"
        " mixes them",
    )
    blocks = images.labels.reshape(10, 256)
    assert min(len(set(block)) for block in blocks) == 10
    for index in (0, 1000, 2559):
        assert labels[int(images.key(index))] == images[index].label
    # Caches that were written before hold the order of the shards.
    stored = images.stored_order()
    assert [stored.key(index) for index in (0, 1, 2559)] == ["00000", "00001", "02559"]
    assert images.with_fingerprint(stored.limited(300).fingerprint, 300).key(299) == "00299"
    assert images.with_fingerprint(images.fingerprint, None).key(0) == images.key(0)
    assert images.with_fingerprint("0" * 64, None) is None


def test_a_shuffled_tar_keeps_its_order(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "train-0.tar", members(shuffled(grouped(10, 256))))
    images = open_dataset(str(tmp_path))
    assert images.notes == ()
    assert [images.key(index) for index in range(3)] == ["00000", "00001", "00002"]


def test_a_local_tar_without_labels_is_mixed(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "train-0.tar", members(grouped(10, 100), with_labels=False))
    images = open_dataset(str(tmp_path))
    assert (images.labels == -1).all()
    assert any("no labels that would show whether it is shuffled" in note for note in images.notes)
    first = np.array([int(images.key(index)) for index in range(256)])
    assert 400 < first.mean() < 600


@pytest.mark.parametrize("num_images", [40, 300])
def test_folder_and_local_tar_without_labels_have_one_order(
    tmp_path: Path, write_tar: WriteTar, num_images: int
) -> None:
    """Keys alone decide the order, also of a set that fits into one block."""
    names = [f"{number:03d}" for number in range(num_images)]
    write_tar(tmp_path / "tar/train-0.tar", {f"{name}.jpg": name.encode() for name in names})
    (tmp_path / "bare").mkdir()
    for name in names:
        (tmp_path / "bare" / name).with_suffix(".jpg").write_bytes(name.encode())
    tar, folder = open_dataset(str(tmp_path / "tar")), open_dataset(str(tmp_path / "bare"))
    in_tar = [tar.key(index) for index in range(num_images)]
    digests = [xxhash.xxh3_128_digest(key.encode()) for key in in_tar]
    assert sorted(in_tar) == names
    assert digests == sorted(digests)
    of_folder = [folder.key(index) for index in range(num_images)]
    digests = [xxhash.xxh3_128_digest(key.encode()) for key in of_folder]
    assert digests == sorted(digests)
    assert any("mixes them" in note for note in tar.notes) == (num_images > 256)
    assert [tar.stored_order().key(index) for index in range(num_images)] == names


def test_an_order_that_is_slightly_uneven_is_kept() -> None:
    """Each shard lacks a fifth of the classes: surely no shuffle, and no harm to batches."""
    parts = []
    for shard in range(10):
        labels = shuffled(grouped(100, 25), shard)
        parts.append(labels[(labels + 10 * shard) % 100 >= 20])
    labels = np.concatenate(parts)
    classes = [len(set(labels[start : start + 256])) for start in range(0, len(labels) - 256, 256)]
    assert np.mean(classes) < 80  # a shuffled block has 92
    assert not is_sorted_by_class(labels)
