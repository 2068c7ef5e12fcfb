"""Folders of images without class folders."""

from pathlib import Path

import pytest

from scalekd.errors import DataError, UsageError
from scalekd.images import ImageDataset, ImageOptions, open_dataset

NONE = ImageOptions(labels="none")


def put(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def keys(images: ImageDataset) -> list[str]:
    return sorted(images.key(index) for index in range(len(images)))


@pytest.mark.parametrize("below", ["", "train/"])
def test_a_flat_folder_is_an_image_set_without_labels_and_says_so(
    tmp_path: Path, below: str
) -> None:
    put(tmp_path, *(f"{below}{number}.jpg" for number in range(5)))
    images = open_dataset(str(tmp_path))
    assert keys(images) == [f"{number}.jpg" for number in range(5)]
    assert (images.labels == -1).all()
    assert images.class_names is None
    (note,) = images.notes
    assert "its 5 images have no labels (--labels none)" in note
    same = open_dataset(str(tmp_path), options=NONE)
    assert same.notes == ()
    assert same.fingerprint == images.fingerprint


def test_hidden_and_empty_folders_beside_images_are_no_classes(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg", ".git/objects/2.jpg", ".ipynb_checkpoints/1-checkpoint.jpg")
    (tmp_path / "empty").mkdir()
    images = open_dataset(str(tmp_path))
    assert keys(images) == ["1.jpg"]
    assert "2 hidden files (first: '.git/objects/2.jpg')" in images.notes[1]
    put(tmp_path, "notes/readme.txt")
    with pytest.raises(DataError, match=r"class folder 'notes' has no image.*--labels none"):
        open_dataset(str(tmp_path))
    assert keys(open_dataset(str(tmp_path), options=NONE)) == ["1.jpg"]


@pytest.mark.parametrize("below", ["", "train/"])
def test_without_labels_images_at_every_depth_are_taken(tmp_path: Path, below: str) -> None:
    names = ["0.jpg", "a/1.jpg", "a/b/2.jpg", "c/3.png"]
    put(tmp_path, *(below + name for name in names), below + "c/notes.txt")
    images = open_dataset(str(tmp_path), options=NONE)
    assert keys(images) == sorted(names)
    assert (images.labels == -1).all()
    assert "1 files that are no images" in images.notes[0]


def test_without_labels_a_split_is_still_a_split(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.jpg", "val/a/2.jpg")
    assert keys(open_dataset(str(tmp_path), options=NONE)) == ["a/1.jpg"]
    assert keys(open_dataset(str(tmp_path), "val", options=NONE)) == ["a/2.jpg"]
    with pytest.raises(DataError, match="neither test-"):
        open_dataset(str(tmp_path), "test", options=NONE)


def test_folders_that_may_be_classes_ask_which_is_meant(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    with pytest.raises(DataError, match=r"--split \. takes its own folders .*--labels none"):
        open_dataset(str(tmp_path))
    assert open_dataset(str(tmp_path), ".").class_names == ("a", "b")
    assert keys(open_dataset(str(tmp_path), options=NONE)) == ["a/1.jpg", "b/2.jpg"]


def test_the_order_is_mixed_and_depends_on_the_keys_alone(tmp_path: Path) -> None:
    names = [f"{number:03d}.jpg" for number in range(60)]
    flat = open_dataset(str(put(tmp_path / "one", *names)))
    other = open_dataset(str(put(tmp_path / "two/train", *reversed(names)).parent))
    order = [flat.key(index) for index in range(60)]
    assert order != names
    assert order == [other.key(index) for index in range(60)]


@pytest.mark.parametrize("option", ["input_key", "target_key", "key_column"])
def test_options_of_shards_and_tables_are_refused_for_folders(tmp_path: Path, option: str) -> None:
    put(tmp_path, "train/a/1.jpg")
    with pytest.raises(UsageError, match=rf"--{option.replace('_', '-')}: .*leave the option out"):
        open_dataset(str(tmp_path), options=ImageOptions(**{option: "x"}))


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    put(tmp_path, "notes.txt", "a/data.npy")
    with pytest.raises(DataError, match=r"no image in it .*left out 2 files.*'a/data\.npy'"):
        open_dataset(str(tmp_path), options=NONE)
    with pytest.raises(DataError, match=r"neither train-\*\.tar nor a folder train/ \(it has a,"):
        open_dataset(str(tmp_path))
