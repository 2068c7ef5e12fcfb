"""Settings from someone else: plain data comes through, and nothing else costs time or memory."""

from pathlib import Path

import pytest

from scalekd.errors import DataError, UsageError
from scalekd.training import TrainConfig
from scalekd.training.config import read_yaml_mapping
from scalekd.training.plain_yaml import dump_plain, load_plain

ALIASES = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [" + ", ".join([f"*{a}"] * 10) + "]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_plain_data_round_trips() -> None:
    shared = [1, 2]
    values = {
        "a": shared,
        "b": shared,
        "c": {"d": None, "e": [True, 1.5, "x: y", "2020-01-01", ""]},
    }
    assert load_plain(dump_plain(values)) == values


@pytest.mark.parametrize(
    "text",
    [
        ALIASES,
        "a: &a [*a]",
        "a: &a {b: 1}\nc:\n  <<: *a",
        "[" * 5000,
        "{a: " * 5000,
        "- " * 5000,
        "a: !!python/object/apply:os.system [ls]",
        "a: !!binary aGVsbG8=",
        "a: !!set {x}",
        "a: 2020-01-01",
        "a: !custom 1",
        "a: 0x" + "f" * 5000,
        "a: " + "9" * 5000,
        "a: 99999999999999999999",
        "a: [1, 2",
        "a: \x00",
        "a: 1\n---\nb: 2",
        "a: " + "x" * 300_000,
        "? [a, b]\n: 1\n? {c: d}\n: 1",
    ],
)
def test_other_data_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_plain(text)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    path = tmp_path / "args.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"args\.yaml: cannot be read as YAML"):
        read_yaml_mapping(path)
    with pytest.raises(DataError, match=r"args\.yaml"):
        TrainConfig.from_yaml(path)


@pytest.mark.parametrize("text", ["[]", "1", "", "1: 2", "a: {1: 2}\n3: 4"])
def test_only_a_mapping_with_text_keys_is_accepted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"args\.yaml: expected a mapping"):
        TrainConfig.from_yaml(path)


@pytest.mark.parametrize(
    "line",
    [
        "lr: .inf",
        "lr: .nan",
        "epochs: many",
        "epochs: [1]",
        "model: {a: 1}",
        "distillation: 3",
        f"model: [{'x, ' * 9000}x]",
        f"{'x' * 9000}: 1",
        "weight_decay: .inf",
    ],
)
def test_impossible_values_are_one_bounded_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(f"model: test_vit\noutput: o\n{line}\n" if "model" not in line else line)
    with pytest.raises(DataError) as caught:
        TrainConfig.from_yaml(path)
    assert len(str(caught.value)) < 1000 + len(str(path))
