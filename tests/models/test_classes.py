"""Classes of a model and of a data set, matched by their names."""

from pathlib import Path

import numpy as np
import pytest
from timm.data import ImageNetInfo

from scalekd.errors import DataError, UsageError
from scalekd.models.classes import (
    Classes,
    classes_of_data,
    find_by_name,
    imagenet_names,
    match_classes,
    read_class_map,
    read_class_names,
)

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEACHER = Classes("the teacher", 10, TEN)


def data(*names: str) -> Classes:
    return Classes("pets", len(names), names)


def unnamed(count: int, owner: str = "pets") -> Classes:
    return Classes(owner, count)


def test_a_subset_in_another_order_is_found_by_name() -> None:
    match = match_classes(data("ship", "bird", "dog"), TEACHER)
    assert match.indices == (8, 2, 5)
    assert match.names == ("ship", "bird", "dog")
    assert match.count == 3
    assert match.note == "pets has 3 of the 10 classes of the teacher; they are matched by name"


def test_all_classes_in_another_order_are_mapped() -> None:
    match = match_classes(data(*reversed(TEN)), TEACHER)
    assert match.indices == (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    assert match.note is not None
    assert "differently" in match.note


def test_the_same_classes_in_the_same_order_need_no_map() -> None:
    match = match_classes(data(*TEN), TEACHER)
    assert (match.indices, match.count, match.names, match.note) == (None, 10, TEN, None)


@pytest.mark.parametrize(
    ("wanted", "names", "positions"),
    [
        ("Siamese_cat", ("dog", "siamese cat"), [1]),
        ("GREAT-WHITE  shark", ("great_white_shark", "dog"), [0]),
        ("n01440764", ("dog", "tench, Tinca tinca"), [1]),
        ("tench, Tinca tinca", ("n01443537", "n01440764"), [1]),
        ("tench", ("n01443537", "n01440764"), [1]),
        ("Tinca_tinca", ("tench, Tinca tinca", "goldfish"), [0]),
        ("n01440764", ("n01440764", "tench"), [0]),  # the strictest rule counts
        ("Dog", ("dog", "Dog"), [1]),
        ("cow", ("dog", "cat"), []),
        ("do", ("dog",), []),
        ("crane", ("n02012849", "n03126707"), [0, 1]),  # ImageNet's bird and machine
    ],
)
def test_names_match_despite_spelling_and_synonyms(
    wanted: str, names: tuple[str, ...], positions: list[int]
) -> None:
    assert find_by_name([wanted], names) == [positions]


@pytest.mark.parametrize(
    ("names", "model", "message"),
    [
        (("cat", "cow"), TEACHER, "'cow' is not a class of the teacher; pets has 2 classes"),
        (("crane", "cat"), Classes("M", 3, ("crane", "cat", "crane")), "2 classes of M are called"),
        (("dog", "DOG"), TEACHER, "'dog' and 'DOG' of pets are one class of the teacher"),
        (("cat", "dog"), unnamed(10, "M"), r"pets has 2 classes \(cat, dog\), M has 10 classes"),
    ],
)
def test_an_error_of_matching_names_both_sides_and_the_option(
    names: tuple[str, ...], model: Classes, message: str
) -> None:
    with pytest.raises(DataError, match=f"{message}.*--class-map FILE"):
        match_classes(data(*names), model)


def test_unknown_names_are_accepted_where_the_counts_agree() -> None:
    for ours, theirs in ((unnamed(10), TEACHER), (data(*TEN), unnamed(10, "M"))):
        match = match_classes(ours, theirs)
        assert (match.indices, match.count, match.names) == (None, 10, TEN)
        assert match.note is not None
        assert "by number" in match.note
    with pytest.raises(DataError, match="pets has 7 classes without names, the teacher has 10"):
        match_classes(unnamed(7), TEACHER)


def test_data_without_labels_leaves_all_classes_of_the_model() -> None:
    match = match_classes(unnamed(0), TEACHER)
    assert (match.indices, match.count, match.names) == (None, 10, TEN)


def test_classes_are_matched_by_number_on_request() -> None:
    match = match_classes(unnamed(7), TEACHER, "none")
    assert (match.indices, match.count, match.names) == (None, 10, TEN)
    match = match_classes(data(*"abcdefghij"), TEACHER, "none")
    assert match.names == tuple("abcdefghij")
    with pytest.raises(DataError, match="11 classes"):
        match_classes(unnamed(11), TEACHER, "none")


def test_a_file_maps_each_label(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    path.write_text("8\nBIRD\n")
    match = match_classes(data("boat", "sparrow"), TEACHER, str(path))
    assert match.indices == (8, 2)
    assert match.names == ("boat", "sparrow")
    assert match_classes(unnamed(2), TEACHER, str(path)).names == ("ship", "bird")
    with pytest.raises(UsageError, match="the class map has 2 entries"):
        match_classes(data("a", "b", "c"), TEACHER, str(path))
    with pytest.raises(UsageError, match="the class map has 2 entries"):
        match_classes(data("a"), TEACHER, str(path))
    path.write_text("8\n10\n")
    with pytest.raises(UsageError, match="has class 10, but the teacher has 10 classes"):
        match_classes(data("boat", "sparrow"), TEACHER, str(path))


def test_a_stored_map_is_used_unchanged() -> None:
    assert match_classes(data("boat", "sparrow"), TEACHER, (8, 2)).indices == (8, 2)


def test_imagenet_classes_are_known_by_their_number_where_the_data_has_their_names() -> None:
    model = unnamed(1000, "a checkpoint")
    match = match_classes(data("n01443537", "n01440764"), model)
    assert match.indices == (1, 0)
    with pytest.raises(DataError):
        match_classes(data("n01443537", "goldfish"), model)
    assert imagenet_names(1000) == tuple(ImageNetInfo().label_names())
    assert imagenet_names(7) is None
    for count in (1000, 11221, 11821, 21841, 21842, 21843):
        assert len(set(imagenet_names(count) or ())) == count


def test_labels_beyond_the_names_are_refused() -> None:
    assert classes_of_data("pets", None, np.array([0, -1, 4])).count == 5
    assert classes_of_data("pets", ("a", "b"), np.array([-1, 1])).count == 2
    assert classes_of_data("pets", None, np.array([-1, -1])).count == 0
    with pytest.raises(DataError, match="labels run up to 2, and only 2 classes have names"):
        classes_of_data("pets", ("a", "b"), np.array([0, 2]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\ncow\n", "line 2: 'cow' is not a class number of the model, none of its names"),
        ("1\n-2\n", "line 2: '-2'"),
        ("1\n2\n1\n", "line 3: class '1' is repeated"),
        ("1\nbee\n", "line 2: class 'bee' is repeated"),
        ("1\n\n2\n", "line 2: ''"),
        ("", "is empty"),
    ],
)
def test_an_invalid_class_map_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_class_map(path, ("ant", "bee"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_class_map(tmp_path / "nowhere", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\na\n", "lines 1 and 3 are both 'a'"),
        (b"a\n\nb\n", "line 2: expected a name"),
        (b"a\n" + b"x" * 1001, "line 2: expected a name of at most 1,000"),
        (b"", "is empty"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_class_names_of_a_teacher_are_one_per_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfant\r\n bee \r\n")
    assert read_class_names(path) == ("ant", "bee")
    path.write_bytes("ant\u2028lion\r\nbee\x0cfly\r\n".encode())  # no line ends in a name
    assert read_class_names(path) == ("ant\u2028lion", "bee\x0cfly")
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_class_names(path)
