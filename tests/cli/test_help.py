"""Help: common options first, all of them with --help-all, the nearest names of misspelt ones."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest

from scalekd.cli.main import group
from tests.cli.test_options import commands

Run = Callable[..., Any]
COMMANDS = dict(commands(group))
LONG = [path for path, command in COMMANDS.items() if len(command.params) > 16]


def _listed(text: str) -> set[str]:
    """Options that start a row of the help."""
    rows = re.findall(r"(?m)^  (-[^\n]*?)(?:  |$)", text)
    return {name for row in rows for name in re.findall(r"(?<![\w-])--?[a-z][\w-]*", row)}


def _names(command: click.Command) -> set[str]:
    return {
        name
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("path", COMMANDS)
def test_the_full_help_lists_every_option(run: Run, path: str) -> None:
    ran = run(*path.split(), "--help-all" if path in LONG else "--help")
    assert ran.code == 0
    assert _names(COMMANDS[path]) <= _listed(ran.out)


@pytest.mark.parametrize("path", LONG)
def test_the_short_help_begins_with_about_ten_common_options(run: Run, path: str) -> None:
    ran = run(*path.split(), "--help")
    common = {p.opts[-1] for p in COMMANDS[path].params if getattr(p, "is_common", False)}
    assert 8 <= len(common) <= 10
    assert common <= _listed(ran.out) < _names(COMMANDS[path]) | {"--help", "--help-all", "-h"}
    assert ran.out.index("Common options:") < ran.out.index("Other:")
    assert "--help-all" in ran.out
    required = {p.opts[0] for p in COMMANDS[path].params if p.required and p.opts[0][0] == "-"}
    assert required <= _listed(ran.out)
    full = run(*path.split(), "--help-all").out
    assert full.index("Common options:") < min(
        full.index(f"{title}:")
        for title in {getattr(p, "heading", "Other") for p in COMMANDS[path].params}
        if f"\n{title}:" in full
    )
    left_out = int(re.search(r"--help-all describes (\d+) further options", ran.out)[1])  # type: ignore[index]
    rows = [text.count("\n  -") for text in (ran.out, full)]
    assert rows[1] - rows[0] == left_out > 5


def test_misspelt_names_are_answered_with_the_nearest(run: Run) -> None:
    for arguments, near in (
        (("trian-student",), "'train-student'"),
        (("cache", "inof", "c"), "'info'"),
        (("train-student", "--objectiv", "kd"), "--objective"),
        (("cache-teacher", "--data-dri", "d"), "--data-dir"),
        (("evaluate", "run", "--knn-splt", "train"), "--knn-split"),
    ):
        ran = run(*arguments)
        assert ran.code == 2
        line = ran.err.splitlines()[-1]
        assert line.startswith("scalekd: error: UsageError: ")
        assert near in line


@pytest.mark.parametrize("option", ["--aa", "--mixup", "--color-jitter", "--dataset"])
def test_options_of_timm_are_answered_with_the_equivalent_here(run: Run, option: str) -> None:
    ran = run("train-student", option, "1")
    assert ran.code == 2
    line = ran.err.splitlines()[-1]
    assert option in line
    assert "--aug" in line or "--data-dir" in line or "not mixed" in line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_written_for_each_shell(shell: str) -> None:
    program = "from scalekd.cli.main import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"_SCALEKD_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "_SCALEKD_COMPLETE" in ended.stdout


def test_completion_offers_commands_and_options() -> None:
    program = "from scalekd.cli.main import main; main()"
    for words, number, expected in (
        ("scalekd tr", 1, "train-student"),
        ("scalekd cache-teacher --bud", 2, "--budget"),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", program],
            env={
                "_SCALEKD_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(number),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in ended.stdout, ended.stderr


@pytest.mark.parametrize("group_name", ["", "cache"])
def test_a_group_without_a_command_prints_its_help(run: Run, group_name: str) -> None:
    ran = run(*group_name.split())
    assert ran.code == 2
    assert ran.err == run(*group_name.split(), "--help").out
    assert "error" not in ran.err


@pytest.mark.parametrize("command", ["cache-teacher", "train-student"])
@pytest.mark.parametrize("spelling", [("--aug", "help"), ("--aug=help",)])
def test_aug_help_explains_every_component_line_by_line(
    run: Run, command: str, spelling: tuple[str, ...]
) -> None:
    ran = run(command, *spelling)
    assert (ran.code, ran.err) == (0, "")
    starts = [line.split()[0] for line in ran.out.splitlines() if line.startswith("  ")]
    for start in ("crop[:LO..HI]", "center[:FRACTION]", "flip[:P]", "jitter:S", "erase:P"):
        assert start in starts


def test_a_missing_option_is_named_as_it_is_typed(run: Run) -> None:
    for given, missing in (
        ((), "--model"),
        (("--model", "resnet18"), "--output"),
    ):
        ran = run("train-student", *given)
        assert ran.code == 2
        assert f"{missing} is missing" in ran.err
