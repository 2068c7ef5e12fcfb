from pathlib import Path

import pytest
import timm
from timm.data import ImageNetInfo

from scalekd.errors import DataError, UsageError
from scalekd.evaluation import class_map_by_name, imagenet_class_names, read_class_map


def test_classes_are_found_by_name() -> None:
    model = ("ant", "bee", "cat", "dog")
    assert class_map_by_name(("dog", "ant"), model, place="here") == [3, 0]
    assert class_map_by_name(model, model, place="here") is None
    assert class_map_by_name(None, model, place="here") is None
    assert class_map_by_name(("dog",), None, place="here") is None


def test_a_class_that_is_unknown_or_stands_for_two_is_named() -> None:
    with pytest.raises(DataError, match=r"pets: the model has no class called 'cow'.*--class-map"):
        class_map_by_name(("ant", "cow"), ("ant", "bee"), place="pets")
    # ImageNet itself has two classes called crane.
    with pytest.raises(DataError, match="more than one class called 'crane'"):
        class_map_by_name(("crane",), ("crane", "bee", "crane"), place="pets")


def test_a_file_gives_numbers_or_names(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    path.write_text("7\n 3 \n12\n")
    assert read_class_map(path, None) == [7, 3, 12]
    path.write_text("dog\nant\n")
    assert read_class_map(path, ("ant", "bee", "dog")) == [2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\ncow\n", "line 2: 'cow' is not a class number of the model, none of its names"),
        ("1\n-2\n", "line 2: '-2'"),
        ("1\n2\n1\n", "line 3: class '1' stands twice"),
        ("1\n\n2\n", "line 2: ''"),
        ("", "is empty"),
    ],
)
def test_what_is_no_class_map_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_class_map(path, ("ant", "bee"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_class_map(tmp_path / "nowhere", None)


def test_an_imagenet_models_classes_are_wordnets_where_the_data_sets_are() -> None:
    model = timm.create_model("test_vit", num_classes=1000)
    names = imagenet_class_names(model, ("n01440764", "n15075141"))
    assert names is not None
    assert class_map_by_name(("n01443537", "n01440764"), names, place="here") == [1, 0]
    assert names == tuple(ImageNetInfo().label_names())
    assert imagenet_class_names(model, ("tench", "n15075141")) is None
    assert (
        imagenet_class_names(timm.create_model("test_vit", num_classes=7), ("n01440764",)) is None
    )
