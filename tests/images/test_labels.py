"""Labels of shards: which member holds them, and what is said where none does."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from scalekd.errors import DataError, UsageError
from scalekd.images import ImageDataset, ImageOptions, open_dataset

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]


@pytest.fixture
def opened(tmp_path: Path, write_tar: WriteTar) -> Callable[..., ImageDataset]:
    """Opens a shard of samples ``a``, ``b``, …, each with the members given by extension."""

    def make(*samples: Mapping[str, bytes], **options: str) -> ImageDataset:
        members = {}
        for key, fields in zip("abcdefgh", samples, strict=False):
            members[f"{key}.jpg"] = key.encode()
            members |= {f"{key}.{extension}": value for extension, value in fields.items()}
        write_tar(tmp_path / "train-0.tar", members)
        return open_dataset(str(tmp_path), options=ImageOptions(**options))

    return make


def test_numbers_in_json_or_txt_are_labels_where_every_sample_has_one(
    opened: Callable[..., ImageDataset],
) -> None:
    images = opened({"txt": b"3\n"}, {"txt": b"1"})
    assert images.labels.tolist() == [3, 1]
    assert "the labels of 2 samples are the numbers in their txt members" in images.notes[0]
    images = opened(
        {"json": b'{"label": 2}', "txt": b"9"}, {"json": b'{"label": "4"}', "txt": b"9"}
    )
    assert images.labels.tolist() == [2, 4]
    images = opened({"cls": b"5", "json": b'{"label": 1}'}, {"json": b'{"label": 0}'})
    assert images.labels.tolist() == [5, 0]
    assert "the labels of 1 samples are the numbers in their json members" in images.notes[0]


def test_a_json_label_of_null_is_no_label(opened: Callable[..., ImageDataset]) -> None:
    images = opened({"json": b'{"label": null}'}, {"json": b'{"label": 2}'}, {"cls": b"0"})
    assert images.labels.tolist() == [-1, 2, 0]
    assert "1 of the 3 samples have no label, such as 'a'" in images.notes[1]
    images = opened({"json": b'{"label": null}'}, {"json": b'{"label": null}'})
    assert images.labels.tolist() == [-1, -1]
    (note,) = images.notes
    assert "none of the 2 samples has a label" in note
    images = opened({"json": b"{}"}, {"json": b'{"label": 2}'})  # a label is not always meant
    assert images.labels.tolist() == [-1, -1]


@pytest.mark.parametrize("text", [b"a photo of a cat", b"2 cats", b"1.5", b"\xff", b"1" * 12])
def test_captions_are_no_labels(opened: Callable[..., ImageDataset], text: bytes) -> None:
    images = opened({"txt": b"7"}, {"txt": text})
    assert images.labels.tolist() == [-1, -1]
    assert "none of the 2 samples has a label" in images.notes[0]
    assert "--target-key" in images.notes[0]


def test_some_samples_without_a_label_are_counted_and_named(
    opened: Callable[..., ImageDataset],
) -> None:
    images = opened({"cls": b"1"}, {}, {"cls": b"-1"}, {"cls": b"0"})
    assert images.labels.tolist() == [1, -1, -1, 0]
    (note,) = images.notes
    assert "2 of the 4 samples have no label, such as 'b'" in note
    assert "--labels none" in note


def test_no_label_is_read_where_none_is_wanted(opened: Callable[..., ImageDataset]) -> None:
    images = opened({"cls": b"cat"}, {"cls": b"1", "json": b"{"}, labels="none")
    assert images.labels.tolist() == [-1, -1]
    assert images.class_names is None
    assert images.notes == ()


def test_a_target_key_names_a_member_or_a_field_of_json(
    opened: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    def document(**fields: object) -> dict[str, bytes]:
        return {"cls": b"9", "json": json.dumps(fields).encode()}

    samples = (
        document(fine=3, deep={"coarse": "1"}, name="cat"),
        document(fine=None, deep={"coarse": 0}, name="ant"),
    )
    assert opened(*samples, target_key="fine").labels.tolist() == [3, -1]
    assert opened(*samples, target_key="deep/coarse").labels.tolist() == [1, 0]
    named = opened(*samples, target_key="name")
    assert (named.class_names, named.labels.tolist()) == (("ant", "cat"), [1, 0])
    assert opened({"cls": b"9", "txt": b"4"}, target_key="txt").labels.tolist() == [4]
    assert opened({"json": b"6"}, target_key="json").labels.tolist() == [6]
    (tmp_path / "classes.txt").write_text("cat\ndog\nant\n")
    assert opened(*samples, target_key="name").labels.tolist() == [0, 2]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"1 labels are not among the 2 classes.*'ant'"):
        opened(*samples, target_key="name")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id": 1}', r"a?b\.json has no field 'label' \(fields: id\)"),
        (b'{"label": [1]}', r"b\.json holds '\[1\]'"),
        (b'{"label": 1.5}', r"b\.json holds '1\.5'"),
        (b'{"label": true}', r"b\.json holds 'True'"),
        (b"not json", r"b\.json has no field 'label' \(fields: none\)"),
        (b"[" * 100_000, r"b\.json has no field 'label'"),
        (b'"' + b"x" * (2 << 20) + b'"', r"b\.json has no field 'label'"),
    ],
)
def test_a_label_that_cannot_be_read_is_an_error_with_the_member(
    opened: Callable[..., ImageDataset], content: bytes, words: str
) -> None:
    with pytest.raises(DataError, match=rf"--target-key label: .*{words}.*--labels none"):
        opened({"json": b'{"label": 0}'}, {"json": content}, target_key="label")


def test_a_target_key_that_does_not_exist_is_named(opened: Callable[..., ImageDataset]) -> None:
    with pytest.raises(UsageError, match=r"--target-key fine: .*no sample with a member"):
        opened({"cls": b"1"}, target_key="fine")
    with pytest.raises(DataError, match=r"\.cls is not a class number.*--target-key"):
        opened({"cls": b"x" * (2 << 20)})
    with pytest.raises(DataError, match="some labels are numbers, such as 3, and some are names"):
        opened({"txt": b"3"}, {"txt": b"dog"}, target_key="txt")


def test_classes_of_one_name_cannot_be_labels_by_name(
    opened: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("crane\ntench\ncrane\n")
    assert opened({"cls": b"2"}, {"cls": b"0"}).labels.tolist() == [2, 0]
    assert opened({"txt": b"tench"}, target_key="txt").labels.tolist() == [1]
    with pytest.raises(DataError, match=r"2 of the classes that it lists are called 'crane'"):
        opened({"txt": b"tench"}, {"txt": b"crane"}, target_key="txt")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffant\nbee: x\u2028y\x0c\n",
        "ant\r\nbee: x\u2028y\x0c\r\n",
        " ant \nbee: x\u2028y\x0c\n\n \n",
    ],
)
def test_a_list_of_classes_has_one_name_a_line(
    opened: Callable[..., ImageDataset], tmp_path: Path, text: str
) -> None:
    (tmp_path / "classes.txt").write_bytes(text.encode())
    images = opened({"cls": b"0"}, {"cls": b"1"})
    assert images.class_names == ("ant", "bee: x\u2028y")
    assert opened({"txt": b"ant"}, target_key="txt").labels.tolist() == [0]


def test_numbers_beyond_the_list_of_classes_are_refused(
    opened: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match=r"labels run up to 5, and only 2 classes have names"):
        opened({"cls": b"1"}, {"cls": b"5"})
    assert opened({"cls": b"5"}, labels="none").labels.tolist() == [-1]


def test_two_labels_of_one_sample_must_agree(opened: Callable[..., ImageDataset]) -> None:
    assert opened({"cls": b"1", "cls.txt": b"1\n"}).labels.tolist() == [1]
    with pytest.raises(DataError, match=r"a\.cls\.txt holds the label 2, and another .* 1"):
        opened({"cls": b"1", "cls.txt": b"2"})


def test_whole_numbers_may_be_written_as_floats(opened: Callable[..., ImageDataset]) -> None:
    samples = {"json": b'{"label": 1.0}'}, {"json": b'{"label": 0}'}
    assert opened(*samples).labels.tolist() == [1, 0]
    assert opened(*samples, target_key="label").labels.tolist() == [1, 0]


@pytest.mark.parametrize("input_key", [".png", "png; jpg2", "PNG"])
def test_an_input_key_is_an_extension_with_or_without_its_dot(
    opened: Callable[..., ImageDataset], input_key: str
) -> None:
    images = opened({"png": b"P"}, {"png": b"Q"}, {"depth.png": b"D"}, input_key=input_key)
    assert {sample.image for sample in images.read_many(range(len(images)))} == {b"P", b"Q"}
    (note, _) = images.notes
    assert "3 images whose extension --input-key does not name (first: 'a.jpg')" in note
    assert "1 images whose names have a second dot" in note
    assert "samples without an image" not in note
