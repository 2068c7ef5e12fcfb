"""Commands that read documents, and wrong paths, load no torch: they answer in half a second."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_CACHES = Path(__file__).parents[1] / "cache" / "frozen" / "format1"

_RUN = """
import contextlib, io, json, sys
from scalekd.cli.main import main
results = []
for words in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code
    heavy = {"torch", "timm", "torchvision", "accelerate", "matplotlib", "sklearn", "webdataset"}
    results.append([code, sorted(heavy & set(sys.modules)), err.getvalue()])
print(json.dumps(results))
"""


def _run(*commands: tuple[object, ...]) -> list[tuple[int, list[str], str]]:
    """Run commands in one new interpreter; return exit codes, heavy packages loaded, and errors."""
    words = json.dumps([[str(word) for word in words] for words in commands])
    run = subprocess.run(
        [sys.executable, "-c", _RUN, words], capture_output=True, text=True, check=True
    )
    return [tuple(result) for result in json.loads(run.stdout)]


def test_info_and_ls_load_no_torch() -> None:
    caches = [_CACHES / name for name in ("float16", "int8", "transform")]
    commands = [("cache", "info", cache) for cache in caches]
    commands.append(("cache", "ls", _CACHES, "--json"))
    assert _run(*commands) == [(0, [], "")] * len(commands)


def test_a_folder_that_does_not_exist_is_refused_without_torch(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    train, cache = ("train-student", "--model", "resnet18"), ("cache-teacher", "--model", "swin_t")
    commands: list[tuple[object, ...]] = [
        ("cache", "info", nowhere),
        ("cache", "verify", nowhere),
        ("cache", "repair", nowhere, "--data-dir", "."),
        ("cache", "extend", nowhere, "--data-dir", "."),
        (*train, "--cache", nowhere, "--output", nowhere / "run"),
        (*train, "--cache", _CACHES / "int8", "--data-dir", nowhere, "--output", nowhere / "run"),
        (*cache, "--data-dir", nowhere, "--output", nowhere / "cache"),
        (*cache, "--data-dir", nowhere / "a-*.tar", "--output", nowhere / "cache"),
        ("evaluate", "resnet18", "--data-dir", nowhere),
        ("doctor", "--cache", nowhere),
        ("doctor", "--data-dir", f"file://{nowhere}"),
    ]
    for words, (code, heavy, err) in zip(commands, _run(*commands), strict=True):
        assert (code, heavy) == (3, []), (words, err)
        assert f"{nowhere}" in err, words
        assert "there is no such folder" in err, words
    assert not nowhere.exists()


def test_an_image_set_without_the_split_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.jpg").touch()
    cache = ("cache-teacher", "--model", "swin_t", "--output", tmp_path / "cache")
    commands: list[tuple[object, ...]] = [
        (*cache, "--data-dir", tmp_path),
        ("doctor", "--data-dir", tmp_path),
        ("evaluate", "resnet18", "--data-dir", tmp_path),
    ]
    for words, (code, heavy, err) in zip(commands, _run(*commands), strict=True):
        assert (code, heavy) == (3, []), (words, err)
        assert "has neither" in err, words


def test_info_has_a_gap_between_names_and_values(run: Callable[..., Any]) -> None:
    lines = run("cache", "info", _CACHES / "transform").out.splitlines()
    width = len(lines[0]) - len(lines[0].removeprefix("cache").lstrip())
    assert all(line[width - 2 : width] == "  " for line in lines)
    assert {line[width] for line in lines} != {" "}


def test_sizes_of_few_views_leave_out_what_a_cache_has_once(run: Callable[..., Any]) -> None:
    info = run("cache", "info", _CACHES / "transform", "--json").json
    views = info["num_passes"] * (info["num_samples"] - info["num_skipped"])
    by_array = sum(info["bytes_per_view_by_array"].values())
    assert info["bytes_per_view"] == pytest.approx(by_array)
    assert info["fixed_bytes"] + views * by_array == pytest.approx(info["total_bytes"])
    assert info["fixed_bytes"] > info["total_bytes"] / 2
