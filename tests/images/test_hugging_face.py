"""Tables of the library `datasets`: parquet files, folders of ``save_to_disk``, the Hub's cache."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalekd.errors import DataError, EnvironmentFault, ScaleKDError, UsageError
from scalekd.images import ImageDataset, ImageOptions, open_dataset

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
NUM_ROWS = 12
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def table(image_bytes: dict[int, bytes]) -> Callable[..., Any]:
    """A table of images, classes and ids; columns can be changed (``None`` leaves one out)."""

    def make(**changes: Any) -> Any:
        columns: dict[str, Any] = {
            "image": [{"bytes": image_bytes[i], "path": f"{i}.jpg"} for i in range(NUM_ROWS)],
            "label": [i % 3 for i in range(NUM_ROWS)],
            "id": [f"id-{i}" for i in range(NUM_ROWS)],
        }
        columns = {n: c for n, c in {**columns, **changes}.items() if c is not None}
        features = datasets.Dataset.from_dict(columns).features
        if "image" not in changes:
            features["image"] = datasets.Image()
        if "label" not in changes:
            features["label"] = datasets.ClassLabel(names=CLASSES)
        return datasets.Dataset.from_dict(columns, features=features)

    return make


def write(found: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    found.to_parquet(str(path))
    return path


def samples(images: ImageDataset) -> dict[str, tuple[bytes, int]]:
    return {s.key: (s.image, s.label) for s in images.read_many(range(len(images)))}


@pytest.mark.parametrize("form", ["parquet", "saved", "dict"])
def test_a_table_is_an_image_set(
    form: str, table: Callable[..., Any], image_bytes: dict[int, bytes], tmp_path: Path
) -> None:
    root = tmp_path / "set"
    if form == "parquet":
        write(table().select(range(5)), root / "train-00000-of-00002.parquet")
        write(table().select(range(5, NUM_ROWS)), root / "train-00001-of-00002.parquet")
        write(table().select(range(2)), root / "test-00000-of-00001.parquet")
        keys = [f"train-00000-of-00002/{row:08d}" for row in range(5)]
        keys += [f"train-00001-of-00002/{row:08d}" for row in range(NUM_ROWS - 5)]
    else:
        saved = table()
        (datasets.DatasetDict(train=saved) if form == "dict" else saved).save_to_disk(str(root))
        keys = [f"{row:09d}" for row in range(NUM_ROWS)]
    images = open_dataset(str(root))
    assert [images.key(row) for row in range(NUM_ROWS)] == keys
    assert images.class_names == tuple(CLASSES)
    assert images.notes == ()
    assert samples(images) == {key: (image_bytes[i], i % 3) for i, key in enumerate(keys)}
    assert images.sizes.tolist() == [len(image_bytes[i]) for i in range(NUM_ROWS)]
    again = pickle.loads(pickle.dumps(images.limited(4)))  # as worker processes get it
    assert again[3] == images[3]
    assert not images.is_remote


def test_keys_of_a_column_do_not_depend_on_the_files(
    table: Callable[..., Any], tmp_path: Path
) -> None:
    write(table(), tmp_path / "one/train.parquet")
    for part, rows in enumerate((range(7), range(7, NUM_ROWS))):
        write(table().select(rows), tmp_path / f"two/data/train-{part}.parquet")
    table().save_to_disk(str(tmp_path / "three"))
    found = [
        open_dataset(str(tmp_path / name), options=ImageOptions(key_column="id"))
        for name in ("one", "two", "three")
    ]
    assert len({images.fingerprint for images in found}) == 1
    assert found[0].key(3) == "id-3"
    of_paths = open_dataset(str(tmp_path / "one"), options=ImageOptions(key_column="image/path"))
    assert of_paths.key(3) == "3.jpg"


@pytest.mark.parametrize(
    ("changes", "options", "error", "words"),
    [
        (
            {},
            {"target_key": "fine"},
            UsageError,
            r"--target-key fine: .*no such column .*image, la",
        ),
        ({}, {"input_key": "img"}, UsageError, r"--input-key img: .*no such column .*image, label"),
        ({}, {"input_key": "id"}, UsageError, r"--input-key id: .*not encoded images"),
        ({}, {"key_column": "uuid"}, UsageError, r"--key-column uuid: .*no such column"),
        ({}, {"key_column": "label"}, DataError, r"the key '0' occurs twice"),
        ({"id": [None] * NUM_ROWS}, {"key_column": "id"}, DataError, r"--key-column id: row 0 "),
        ({"image": None}, {}, UsageError, r"no image column.*--input-key"),
        ({"label": [0.5] * NUM_ROWS}, {}, DataError, r"--target-key label: row 0 .*holds '0\.5'"),
        ({"label": [-2] * NUM_ROWS}, {}, DataError, r"--target-key label: row 0 .*holds '-2'"),
        ({"label": [[1]] * NUM_ROWS}, {}, DataError, r"--target-key label: row 0 .*holds '\[1\]'"),
        (
            {"label": [10**9] * NUM_ROWS},
            {},
            DataError,
            r"row 0 .*holds '1000000000'.*--labels none",
        ),
        (
            {},
            {"target_key": "label/x"},
            UsageError,
            r"--target-key label/x: .*no such field.*Class",
        ),
        ({}, {"key_column": "image/name"}, UsageError, r"--key-column image/name: .*no such field"),
        ({}, {"key_column": "id/x"}, UsageError, r"--key-column id/x: .*no such field.*string"),
        (
            {"label": [{"kind": 1}] * NUM_ROWS},
            {"target_key": "label/sort"},
            UsageError,
            r"--target-key label/sort: .*no such field.*kind",
        ),
        ({"image": [{"bytes": 3, "path": "x"}] * NUM_ROWS}, {}, UsageError, r"no image column"),
        ({"image": [{"bytes": "x"}] * NUM_ROWS}, {}, UsageError, r"no image column"),
        ({"image": [b""] * NUM_ROWS}, {}, DataError, r"no image in it.*12 rows without an image"),
        (
            {"image": [{"bytes": None, "path": "/etc/passwd"}] * NUM_ROWS},
            {},
            DataError,
            r"holds the path '/etc/passwd' and not the bytes",
        ),
    ],
)
def test_bad_tables_are_refused_in_one_line(
    changes: dict[str, Any],
    options: dict[str, str],
    error: type[ScaleKDError],
    words: str,
    table: Callable[..., Any],
    tmp_path: Path,
) -> None:
    write(table(**changes), tmp_path / "set/train-0.parquet")
    with pytest.raises(error, match=words) as caught:
        open_dataset(str(tmp_path / "set"), options=ImageOptions(**options))
    assert "\n" not in str(caught.value)


def test_several_columns_that_could_be_meant_ask_which(
    table: Callable[..., Any], image_bytes: dict[int, bytes], tmp_path: Path
) -> None:
    raw = [image_bytes[i] for i in range(NUM_ROWS)]
    both = table(label=None, image=None, left=raw, right=raw, coarse=[0] * NUM_ROWS)
    both = both.cast_column("left", datasets.Image()).cast_column("right", datasets.Image())
    both = both.cast_column("coarse", datasets.ClassLabel(names=["x"]))
    both = both.add_column("fine", [i % 3 for i in range(NUM_ROWS)])
    both = both.cast_column("fine", datasets.ClassLabel(names=CLASSES))
    write(both, tmp_path / "set/train-0.parquet")
    root = str(tmp_path / "set")
    with pytest.raises(UsageError, match=r"several image columns \(left, right\).*--input-key"):
        open_dataset(root)
    with pytest.raises(UsageError, match=r"several columns of classes \(coarse, fine\).*--target"):
        open_dataset(root, options=ImageOptions(input_key="left"))
    images = open_dataset(root, options=ImageOptions(input_key="left", target_key="fine"))
    assert images.labels.tolist() == [i % 3 for i in range(NUM_ROWS)]
    none = open_dataset(root, options=ImageOptions(input_key="left", labels="none"))
    assert (none.labels == -1).all()


def test_labels_may_be_names_numbers_or_missing(table: Callable[..., Any], tmp_path: Path) -> None:
    names = ["wolf", "fox", None] * 4
    write(table(label=names), tmp_path / "names/train-0.parquet")
    images = open_dataset(str(tmp_path / "names"))
    assert images.class_names == ("fox", "wolf")
    assert images.labels.tolist() == [1, 0, -1] * 4
    assert "4 of the 12 samples have no label, such as" in images.notes[0]
    write(table(label=[-1] * NUM_ROWS), tmp_path / "hidden/train-0.parquet")
    images = open_dataset(str(tmp_path / "hidden"))
    assert (images.labels == -1).all()
    assert "none of the 12 samples has a label" in images.notes[0]
    write(table(label=None), tmp_path / "none/train-0.parquet")
    images = open_dataset(str(tmp_path / "none"))
    assert (images.labels == -1).all()
    assert "has no column of labels (columns: image, id)" in images.notes[0]


@pytest.mark.parametrize(
    "labels",
    [
        ["2", "10", "", None] * 3,  # not in alphabetical order
        ["2 ", " 10", "  ", "-1"] * 3,
        [2.0, 10.0, float("nan"), None] * 3,
    ],
)
def test_numbers_may_be_written_as_texts_or_floats(
    labels: list[Any], table: Callable[..., Any], tmp_path: Path
) -> None:
    write(table(label=labels), tmp_path / "set/train-0.parquet")
    images = open_dataset(str(tmp_path / "set"))
    assert images.labels.tolist() == [2, 10, -1, -1] * 3
    assert images.class_names is None
    assert "6 of the 12 samples have no label" in images.notes[0]


def test_names_are_stripped_and_an_empty_one_is_no_label(
    table: Callable[..., Any], tmp_path: Path
) -> None:
    write(table(label=["wolf ", "wolf", "", "7"] * 3), tmp_path / "set/train-0.parquet")
    images = open_dataset(str(tmp_path / "set"))
    assert images.class_names == ("7", "wolf")
    assert images.labels.tolist() == [1, 1, -1, 0] * 3


def test_class_names_of_a_nested_column_are_read(table: Callable[..., Any], tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "a/b", "c"]
    nested = table(label=None, found=[{"kind": i % 3} for i in range(NUM_ROWS)])
    features = nested.features.copy()
    features["found"] = {"kind": datasets.ClassLabel(names=names)}
    write(nested.cast(features), tmp_path / "set/train-0.parquet")
    images = open_dataset(str(tmp_path / "set"), options=ImageOptions(target_key="found/kind"))
    assert images.class_names == tuple(names)
    assert images.labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_table_without_rows_has_no_image(
    form: str, table: Callable[..., Any], tmp_path: Path
) -> None:
    empty = table().select(range(0))
    if form == "parquet":
        write(empty, tmp_path / "set/train-0.parquet")
    else:
        empty.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"set.*: no image in it"):
        open_dataset(str(tmp_path / "set"))


@pytest.mark.parametrize(
    "others", [("test_00",), ("valset", "Test-1"), ("my-dev.v2", "pets_validation"), ("tests",)]
)
@pytest.mark.parametrize("own", ["train_00", "my-train", "Training", "pets"])
def test_tables_of_other_splits_are_not_trained_on(
    own: str, others: tuple[str, ...], table: Callable[..., Any], tmp_path: Path
) -> None:
    write(table(), tmp_path / f"set/{own}.parquet")
    for name in others:
        write(table().select(range(3)), tmp_path / f"set/{name}.parquet")
    images = open_dataset(str(tmp_path / "set"))
    assert len(images) == NUM_ROWS
    assert images.key(0).startswith(f"{own}/")


def test_tables_beside_images_are_not_taken_for_them(
    table: Callable[..., Any], image_bytes: dict[int, bytes], tmp_path: Path
) -> None:
    names = table(image=None)
    for root in ("flat", "above/train/a", "beside/train/a"):
        (tmp_path / root).mkdir(parents=True)
        (tmp_path / root / "1.png").write_bytes(image_bytes[0])
    write(names, tmp_path / "flat/metadata.parquet")
    write(names, tmp_path / "above/metadata.parquet")
    write(names, tmp_path / "beside/train/metadata.parquet")
    for root, key in (("flat", "1.png"), ("above", "a/1.png"), ("beside", "a/1.png")):
        images = open_dataset(str(tmp_path / root))
        assert [images.key(row) for row in range(len(images))] == [key]
    assert "1 files that are no images" in images.notes[0]


def test_rows_without_an_image_are_counted(
    table: Callable[..., Any], image_bytes: dict[int, bytes], tmp_path: Path
) -> None:
    raw = [image_bytes[i] if i != 4 else None for i in range(NUM_ROWS)]
    write(table(image=raw), tmp_path / "set/train-0.parquet")
    images = open_dataset(str(tmp_path / "set"))
    assert len(images) == NUM_ROWS - 1
    assert images[4].image == image_bytes[5]
    assert images.key(4).endswith("/00000005")
    assert "1 rows without an image (first: 'row 4')" in images.notes[0]


def test_a_table_sorted_by_class_is_mixed(table: Callable[..., Any], tmp_path: Path) -> None:
    few = table()
    count = 900
    rows = [3 * (i % 4) + (i * 3) // count for i in range(count)]  # classes in order
    big = few.select(rows).remove_columns("id").add_column("id", [f"{i:04d}" for i in range(count)])
    write(big, tmp_path / "set/train-0.parquet")
    images = open_dataset(str(tmp_path / "set"), options=ImageOptions(key_column="id"))
    assert "is sorted by class" in images.notes[0]
    assert set(images.labels[:256]) == {0, 1, 2}
    for position in (0, 100, 899):
        number = int(images.key(position))
        assert images.labels[position] == number * 3 // count
        assert (
            images[position].image
            == few.with_format("arrow")[rows[number]].column(0)[0].as_py()["bytes"]
        )
    assert np.array_equal(images.stored_order().rows, np.arange(count))


def test_damaged_and_hostile_folders_are_refused(table: Callable[..., Any], tmp_path: Path) -> None:
    path = write(table(), tmp_path / "set/train-0.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"set.*: .*[Pp]arquet") as caught:
        open_dataset(str(tmp_path / "set"))
    assert "\n" not in str(caught.value)

    few_bytes = pyarrow.table({"image": pyarrow.nulls(10**6, pyarrow.binary())})
    pyarrow.parquet.write_table(few_bytes, path)
    with pytest.raises(DataError, match="states 1,000,000 rows, more than it has bytes"):
        open_dataset(str(tmp_path / "set"))

    saved = tmp_path / "saved"
    table().save_to_disk(str(saved))
    state = json.loads((saved / "state.json").read_text())
    for name in ("../other/data.arrow", "/etc/passwd", "..", 3, None):
        state["_data_files"] = [{"filename": name}]
        (saved / "state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match="not the name of a file beside it"):
            open_dataset(str(saved))
    for text in ("[]", "{", '{"_data_files": 3}', "[" * 100_000):
        (saved / "state.json").write_text(text)
        with pytest.raises(DataError, match="does not list the files"):
            open_dataset(str(saved))


def test_splits_that_are_not_there_are_named(table: Callable[..., Any], tmp_path: Path) -> None:
    datasets.DatasetDict(train=table(), test=table()).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"has no split val \(splits: test, train\)"):
        open_dataset(str(tmp_path / "set"), "val")
    assert len(open_dataset(str(tmp_path / "set"), "test")) == NUM_ROWS
    write(table(), tmp_path / "tables/train-0.parquet")
    with pytest.raises(DataError, match="neither val-"):
        open_dataset(str(tmp_path / "tables"), "val")


def test_the_hub_is_asked_by_name_and_its_absence_is_said(
    table: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images = open_dataset("hfds/org/pets:small", "validation")
    assert asked == [(("org/pets", "small"), {"split": "validation"})]
    assert images.key(3) == "000000003"
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    with pytest.raises((EnvironmentFault, DataError)) as caught:
        open_dataset("hfds/org/pets")
    assert str(caught.value).startswith("hfds/org/pets: ")
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="is a folder of this machine"):
        open_dataset("hfds/mine")
