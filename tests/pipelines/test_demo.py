"""``make demo``: the whole path on data that comes with scikit-learn, and its document."""

import os
import re
import shlex
from pathlib import Path

import pytest

from scalekd.images import open_dataset
from scalekd.pipelines._digits import NUM_LABELLED, NUM_TRAIN, write_digits
from scalekd.pipelines.demo import DemoResult, run_demo
from tests.conftest import run_script

MOST_BYTES = 50e6
DOCUMENT = Path(__file__).parents[2] / "docs/digits.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, list[str], Path]:
    """One epoch a student: enough for every part to run, not for the students to learn."""
    folder = tmp_path_factory.mktemp("demo")
    lines: list[str] = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = run_demo(Path("output/demo"), epochs=1, say=lines.append)
    finally:
        os.chdir(before)
    return result, lines, folder


@pytest.mark.slow
def test_the_demo_trains_a_teacher_and_compares_students(
    ran: tuple[DemoResult, list[str], Path],
) -> None:
    result, lines, folder = ran
    assert result.teacher_top1 > 90
    assert [row.objective for row in result.rows] == ["none", "kd", "scalekd-light"]
    assert [row.num_images for row in result.rows] == [NUM_LABELLED, NUM_TRAIN, NUM_TRAIN]
    assert all(0 < score < 100 for row in result.rows for score in row.top1)
    told = "\n".join(lines)
    assert len(re.findall(r"student \d of 9: ", told)) == 9
    table = "\n".join(result.lines())
    assert f"{result.teacher_top1:.1f} %" in table
    assert (folder / result.report).absolute().as_uri() in table
    assert "try next: scalekd " in table
    page = (folder / result.report).read_text(encoding="utf-8")
    assert all(f"<td>{row.name}</td>" in page for row in result.rows)
    assert "<td>digits-swin</td>" in page
    assert "ms_in1k" not in page
    assert f"{result.teacher_top1:.1f} %" in page
    assert page.count("<svg") == 1
    assert '<a href="./cache.html">' in page
    shown = (folder / result.report).with_name("cache.html").read_text(encoding="utf-8")
    assert shown.count("<article") == 12
    assert "stage 4, teacher" in shown


@pytest.mark.slow
def test_the_demo_writes_at_most_its_stated_size(ran: tuple[DemoResult, list[str], Path]) -> None:
    _, _, folder = ran
    files = [path for path in (folder / "output/demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert len([path for path in files if path.name == "summary.csv"]) == 9


@pytest.mark.slow
def test_commands_of_the_document_run_after_the_demo(
    ran: tuple[DemoResult, list[str], Path],
) -> None:
    result, _, folder = ran
    suggested = [
        line.removeprefix("try next: ").strip()
        for line in result.lines()
        if line.lstrip().removeprefix("try next: ").lstrip().startswith("scalekd ")
    ]
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"(?ms)^<!-- program: (\w+) -->\n```sh\n(.*?)^```$", text))
    another = blocks["another"].replace("--epochs 4", "--epochs 1")
    lines = [line for line in suggested if "--help" not in line]
    assert len(lines) >= 2
    script = "\n".join([*lines, blocks["look"], another])
    ended = run_script(script, folder)
    assert "0 damaged" in ended.stdout
    assert shlex.split(lines[0])[:3] == ["scalekd", "cache", "info"]
    assert (folder / "output/another.html").is_file()


def test_few_of_the_digits_have_a_label(tmp_path: Path) -> None:
    write_digits(tmp_path)
    images = open_dataset(str(tmp_path), "train")
    assert len(images) == NUM_TRAIN
    assert int((images.labels >= 0).sum()) == NUM_LABELLED
    labelled = open_dataset(str(tmp_path), "labelled")
    assert len({bytes(key).decode().rsplit("_", 1)[0] for key in labelled.keys}) == NUM_LABELLED
    assert (open_dataset(str(tmp_path), "teacher").labels >= 0).all()
    val = open_dataset(str(tmp_path), "val")
    assert not set(map(bytes, val.keys)) & set(map(bytes, images.keys))
