"""The commands of docs/sharing.md: they parse as written, and do together what the page says."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from scalekd.cli.main import group

_PAGE = Path(__file__).parents[2] / "docs" / "sharing.md"


def _documented() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", _PAGE.read_text().replace("\\\n", " "), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line.replace("…", "").strip() for line in lines if line.startswith("scalekd ")]


@pytest.mark.parametrize("line", _documented())
def test_documented_command_lines_are_accepted(line: str) -> None:
    arguments, command = shlex.split(line)[1:], group
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), arguments.pop(0))
        assert found is not None, line
        command = found  # type: ignore[assignment]
    command.make_context(command.name, arguments)


def test_a_cache_is_extended_pushed_pulled_and_listed(
    run: Callable[..., Any], make_cache: Any, tiny_images: Path, tmp_path: Path
) -> None:
    cache, bucket = tmp_path / "cache", tmp_path / "bucket"
    make_cache(cache, passes=1, licence="mit", note="made on a Monday")
    images = ("--data-dir", tiny_images, "-j", 0)
    grown = run("cache", "extend", cache, *images, "--passes", 2)
    assert (grown.code, "2 passes" in grown.out) == (0, True), grown.err
    other = ("--name", "other", "--model", "test_vit2", "--no-pretrained")
    added = run("cache", "extend", cache, *images, *other, "--model-kwargs", "num_classes=10")
    assert added.code == 0, added.err
    pushed = run("cache", "push", cache, bucket, "--json")
    assert json.loads(pushed.out)["extensions"] == ["other"]
    part = tmp_path / "part"
    pulled = run("cache", "pull", bucket, part, "--logits-only", "--passes", "1")
    assert (pulled.code, "a part: passes 1, targets logits" in pulled.out) == (0, True)
    for root in (bucket, part):
        verified = run("cache", "verify", root)
        assert verified.code == 0, verified.err
    info = run("cache", "info", part)
    assert re.search("^here +a part: passes 1, targets logits$", info.out, re.MULTILINE)
    assert re.search("^extensions +other$", info.out, re.MULTILINE)
    assert re.search("^licence +mit$", info.out, re.MULTILINE)
    assert "stage4" not in info.out
    merged = run("cache", "merge", cache, "--output", tmp_path / "merged")
    assert "2 passes complete" in merged.out
    listed = json.loads(run("cache", "ls", tmp_path, "--json").out)["caches"]
    names = {Path(c["path"]).relative_to(tmp_path).as_posix(): c["state"] for c in listed}
    assert names == {
        "bucket": "complete",
        "bucket/extensions/other": "complete",
        "cache": "complete",
        "cache/extensions/other": "complete",
        "merged": "complete",
        "merged/extensions/other": "complete",
        "part": "part",
        "part/extensions/other": "part",
    }
    assert {c["licence"] for c in listed} == {"mit", None}
    deep = run("cache", "verify", part, "--deep", 3, *images[:2])
    assert deep.code == 0, deep.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("pull", "{tmp}/nothing", "{tmp}/new"), 3),
        (("push", "{cache}", "https://example.invalid/cache"), 2),
        (("push", "{cache}", "gopher://lab/cache"), 2),
        (("pull", "{cache}", "{tmp}/new", "--passes", "x"), 2),
        (("pull", "{cache}", "{tmp}/new", "--passes", "7-9"), 2),
        (("pull", "{cache}", "{tmp}/new", "--jobs", "0"), 2),
        (("ls", "{tmp}/nothing"), 3),
        (("merge", "{cache}", "--output", "{cache}"), 2),
        (("merge",), 2),
        (("extend", "{cache}", "--data-dir", "{tmp}"), 2),
        (("extend", "{tmp}/nothing", "--data-dir", "{tmp}", "--passes", "2"), 3),
    ],
)
def test_invalid_arguments_have_the_right_exit_code(
    run: Callable[..., Any], sound_cache: Path, tmp_path: Path, arguments: Any, code: int
) -> None:
    filled = [
        a.replace("{tmp}", str(tmp_path)).replace("{cache}", str(sound_cache)) for a in arguments
    ]
    ran = run("cache", *filled)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "new").exists()
