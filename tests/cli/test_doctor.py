"""``scalekd doctor --data-dir``: an image set is checked before a teacher runs over it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of one class and two of another, of two sizes."""
    for name, count in (("dogs", 3), ("cats", 2)):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40 + number, 30)).save(folder / f"{number}.jpg")
    return tmp_path / "photos"


def test_a_sound_set_is_described(run: Run, photos: Path) -> None:
    found = run("doctor", "--data-dir", photos, "--json")
    assert found.code == 0, found.err
    check = found.json["images"]["check"]
    assert (check["num_decoded"], check["num_unreadable"]) == (5, 0)
    assert (check["width"], check["height"]) == ([40, 41, 42], [30, 30, 30])
    assert check["smallest_class"] == ["cats", 2]
    assert check["largest_class"] == ["dogs", 3]
    assert "5 of 5 images decoded, 0 unreadable" in run("doctor", "--data-dir", photos).out


def _truncated() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize("content", [b"", b"<html>", _truncated()], ids=["empty", "text", "cut"])
def test_images_that_cannot_be_decoded_are_named(run: Run, photos: Path, content: bytes) -> None:
    (photos / "train" / "cats" / "bad.png").write_bytes(content)
    found = run("doctor", "--data-dir", photos)
    assert found.code == 3
    assert "6 of 6 images decoded, 1 unreadable" in found.out
    assert "cats/bad.png" in found.out
    assert "1 of 6 images cannot be decoded" in found.err
    assert "--skip-corrupt" in found.err


def test_part_of_a_large_set_is_decoded(run: Run, photos: Path) -> None:
    found = run("doctor", "--data-dir", photos, "--images", 2)
    assert "2 of 5 images decoded, 0 unreadable; --images 0 decodes all" in found.out
    everything = run("doctor", "--data-dir", photos, "--images", 0)
    assert "5 of 5 images decoded, 0 unreadable\n" in everything.out


def test_files_that_are_not_read_are_named(run: Run, photos: Path) -> None:
    (photos / "train" / "stray.jpg").write_bytes((photos / "train/cats/0.jpg").read_bytes())
    (photos / "train" / "cats" / "notes.txt").write_text("x")
    out = run("doctor", "--data-dir", photos).out
    assert "stray.jpg" in out
    assert "notes.txt" in out
