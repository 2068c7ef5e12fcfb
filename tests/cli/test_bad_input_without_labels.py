"""What label-free work refuses: one line with the option to give, before any model runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from scalekd.teachers import Teacher
from scalekd.training import DistillationModule

Run = Callable[..., Any]


def write_table(folder: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
    (folder / "table").mkdir()
    table = datasets.Dataset.from_dict(columns)
    table.to_parquet(str(folder / "table/train-00000-of-00001.parquet"))
    return folder / "table"


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets no teacher, and no step of training, run from then on."""

    def forbid() -> None:
        def forward(self: nn.Module, *arguments: Any, **options: Any) -> None:
            raise AssertionError(f"{type(self).__name__} ran")

        monkeypatch.setattr(Teacher, "forward", forward)
        monkeypatch.setattr(DistillationModule, "forward", forward)

    return forbid


@pytest.fixture
def cache(
    run: Run, no_forward: Callable[[], None], tiny_images: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Writes a cache without labels of a teacher without a classifier."""

    def write(*options: object) -> Path:
        command = ("cache-teacher", "--model", "test_vit", "--no-pretrained", "--img-size", 32)
        command += ("--model-kwargs", "num_classes=0", "--data-dir", tiny_images, "-j", 0)
        options = options or ("--labels", "none")
        ran = run(*command, "--codec", "float16", "--output", tmp_path / "cache", *options)
        assert ran.code == 0, ran.err
        no_forward()
        return tmp_path / "cache"

    return write


def refused(ran: Any, code: int, *words: str) -> None:
    assert ran.code == code, ran.err
    lines = [line for line in ran.err.splitlines() if not line.startswith("scalekd: note:")]
    errors = [line for line in lines if "error" in line]
    assert len(errors) == 1, ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("stages", "objective", "code", "words"),
    [
        ("3,4", "kd --distillation kd_alpha=1", 2, ("no logits", "--objective features")),
        ("3,4", "kd", 3, ("has a label", "--objective features")),
        ("3,4", "scalekd", 3, ("has a label", "--objective features")),
        ("none", "features", 2, ("no final-stage features", "--stages final")),
        ("3,4", "none", 3, ("has a label", "--objective features")),
    ],
)
def test_an_objective_without_its_targets_or_labels_is_refused(
    run: Run,
    cache: Callable[..., Path],
    tiny_images: Path,
    tmp_path: Path,
    stages: str,
    objective: str,
    code: int,
    words: tuple[str, ...],
) -> None:
    root = cache("--labels", "none", "--stages", stages)
    train = ("train-student", "--cache", root, "--data-dir", tiny_images, "--labels", "none")
    train += ("--model", "test_resnet", "-b", 10, "-j", 0, "--val-split", "none")
    wanted = ("--objective", *objective.split(), "--num-classes", 3)
    ran = run(*train, *wanted, "--output", tmp_path / "run")
    refused(ran, code, *words)
    assert not (tmp_path / "run/last").exists()


def test_logits_of_a_teacher_without_a_classifier_are_refused(
    run: Run, no_forward: Callable[[], None], tiny_images: Path, tmp_path: Path
) -> None:
    no_forward()
    command = ("cache-teacher", "--model", "test_vit", "--no-pretrained", "--model-kwargs")
    command += ("num_classes=0", "--data-dir", tiny_images, "--logits", "full")
    refused(run(*command, "--output", tmp_path / "c"), 2, "--logits none")


@pytest.mark.parametrize(
    ("columns", "options", "code", "words"),
    [
        ("image", ("--target-key", "kind"), 2, ("kind", "image", "--target-key")),
        ("text", (), 2, ("--input-key",)),
        ("image", ("--input-key", "photo"), 2, ("photo", "image")),
        ("image", ("--key-column", "id"), 2, ("id", "--key-column")),
    ],
)
def test_tables_without_the_column_are_refused(
    run: Run,
    no_forward: Callable[[], None],
    image_bytes: dict[int, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
    options: tuple[str, ...],
    code: int,
    words: tuple[str, ...],
) -> None:
    no_forward()
    rows = {"image": [{"bytes": image_bytes[n], "path": None} for n in range(8)]}
    content = rows if columns == "image" else {"text": ["a", "b"], "number": [1, 2]}
    table = write_table(tmp_path, content, monkeypatch)
    command = ("cache-teacher", "--model", "test_vit", "--no-pretrained", "--data-dir", table)
    refused(run(*command, *options, "--output", tmp_path / "c"), code, *words)


def test_a_data_set_without_images_is_refused(
    run: Run, no_forward: Callable[[], None], tmp_path: Path
) -> None:
    no_forward()
    (tmp_path / "photos/more").mkdir(parents=True)
    (tmp_path / "photos/more/notes.txt").write_text("x")
    command = ("cache-teacher", "--model", "test_vit", "--no-pretrained", "--labels", "none")
    ran = run(*command, "--data-dir", tmp_path / "photos", "--output", tmp_path / "c")
    refused(ran, 3, "no image in it", "notes.txt")


def test_partly_labelled_images_give_one_note(
    run: Run,
    image_bytes: dict[int, bytes],
    write_tar: Callable[..., Path],
    tmp_path: Path,
) -> None:
    members = {}
    for number in range(20):
        members[f"{number:02d}.jpg"] = image_bytes[number]
        if number % 4:
            members[f"{number:02d}.cls"] = b"%d" % (number % 2)
    write_tar(tmp_path / "tars/train-0.tar", members)
    command = ("cache-teacher", "--model", "test_vit", "--no-pretrained", "--img-size", 32)
    command += ("--model-kwargs", "num_classes=2", "--data-dir", tmp_path / "tars", "-j", 0)
    ran = run(*command, "--codec", "float16", "--output", tmp_path / "cache")
    assert ran.code == 0, ran.err
    assert sum("no label" in line for line in ran.err.splitlines()) == 1
    train = ("train-student", "--cache", tmp_path / "cache", "--data-dir", tmp_path / "tars")
    train += ("--model", "test_resnet", "-b", 10, "-j", 0, "--val-split", "none", "--epochs", 1)
    ran = run(*train, "--output", tmp_path / "run")
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.err.splitlines() if "no label" in line]
    assert "5 of the 20 samples have no label" in line
