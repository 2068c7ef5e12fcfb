"""A layout that is not recognised: the error names the options that take it."""

from pathlib import Path

import pytest

from scalekd.errors import DataError
from scalekd.images import open_dataset


@pytest.mark.parametrize(
    ("files", "split", "advice"),
    [
        (["cats/1.jpg"], "train", r"--split \. takes its own folders as classes"),
        (["imagenet1k-train-0001.tar"], "train", r"--split 'imagenet1k-train-\*\.tar'"),
        (["train.tar"], "train", r"--split 'train\.tar'"),
        (["a-0.tar", "b-train-0.tar"], "train", r"--split 'b-train-\*\.tar'"),
        (["validation/cats/1.jpg"], "val", r"--val-split or --split validation takes that folder"),
        (["Test/cats/1.jpg"], "val", r"--split Test takes"),
        (["eval-7.parquet"], "val", r"--split 'eval-\*\.parquet'"),
        (["training/cats/1.jpg"], "train", r"--split training takes that folder"),
    ],
)
def test_the_error_names_ways_out(
    files: list[str], split: str, advice: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=advice):
        open_dataset(str(tmp_path), split)


def test_names_in_the_advice_are_printable(tmp_path: Path) -> None:
    (tmp_path / "train\x1b[31m.tar").touch()
    with pytest.raises(DataError, match="--split") as caught:
        open_dataset(str(tmp_path), "train")
    assert "\x1b" not in str(caught.value)
