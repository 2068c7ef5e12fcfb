"""``docs/distil-without-labels.md``: its commands in their order, with tiny models and images."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from scalekd.cli.main import main
from scalekd.images import open_dataset

DOCUMENT = "docs/distil-without-labels.md"
# Nothing else of the commands is changed.
TINY = {
    ("--model", "dinov2_s"): ["--model", "test_vit", "--no-pretrained", "--img-size", "32"],
    ("--model", "dinov3_s"): ["--model", "test_vit2", "--no-pretrained"],
    ("--model", "resnet50"): ["--model", "test_resnet", "-b", "16"],
}


@pytest.fixture
def folder(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``photos``, images at two depths without labels, and ``labelled``, a few in class folders."""
    images = open_dataset(str(tiny_images))
    for number, sample in enumerate(images.read_many(range(len(images)))):
        path = tmp_path / "photos" / ("" if number % 2 else "more") / f"{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
    for name, colour in (("cat", (200, 40, 40)), ("dog", (40, 40, 200))):
        for split, count in (("train", 12), ("val", 3)):
            (tmp_path / "labelled" / split / name).mkdir(parents=True)
            for number in range(count):
                shade = tuple(value + number for value in colour)
                picture = Image.new("RGB", (50, 40), shade)
                picture.save(tmp_path / "labelled" / split / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(block: str) -> list[list[str]]:
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    found = []
    for line in filter(None, map(str.strip, lines)):
        program, *arguments = shlex.split(line)
        assert program == "scalekd", line
        text = "\0".join(arguments)
        for words, small in TINY.items():
            text = text.replace("\0".join(words), "\0".join(small))
        found.append([*text.split("\0"), *([] if arguments[0] == "export" else ["-j", "0"])])
    return found


def test_the_page_leads_from_photographs_to_a_classifier_and_a_backbone(
    programs: Callable[[str, str], dict[str, str]],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = programs(DOCUMENT, "sh")
    assert list(blocks) == ["cache", "train", "evaluate", "classifier", "export", "teachers"]
    said = {}
    for name, block in blocks.items():
        for command in commands(block):
            capsys.readouterr()
            main(command)
            said[name] = capsys.readouterr()
    assert "nearest of 24 images" in said["evaluate"].out
    assert "logistic regression on the features of 24 images" in said["evaluate"].out
    assert re.search(r"top-1 \d+\.\d\d %", said["classifier"].out)
    header = (folder / "two/summary.csv").read_text().partition("\n")[0].split(",")
    assert {"train_base_summary_loss", "train_dinov3_stage4_spatial_loss"} <= set(header)

    (code,) = programs(DOCUMENT, "python").values()
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("(1, ") == 3
