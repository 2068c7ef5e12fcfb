"""Errors of the command line: stable names, JSON on failure, and a section each in a document."""

import errno
import importlib
import json
import pickle
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import scalekd
from scalekd import errors
from scalekd.cli import main as cli
from scalekd.errors import (
    CacheMismatch,
    DataError,
    EnvironmentFault,
    ScaleKDError,
    TrainingDiverged,
    TrainingInterrupted,
    UsageError,
)
from scalekd.signals import Terminated

Run = Callable[..., Any]
PAGE = Path(__file__).parents[2] / "docs/errors.md"


def _subclasses(base: type[ScaleKDError]) -> Iterator[type[ScaleKDError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)


def _all_errors() -> set[type[ScaleKDError]]:
    for module in pkgutil.walk_packages(scalekd.__path__, "scalekd."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:  # needs a package that is not installed
                continue
    return {ScaleKDError, *_subclasses(ScaleKDError)}


def test_every_error_has_a_section_with_its_name_and_exit_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sections = dict(re.findall(r"(?ms)^## (\w+)\n\n(.*?)(?=^## |\Z)", text))
    kinds = {kind for kind in _all_errors() if kind.__module__.startswith("scalekd")}
    assert sections.keys() == {kind.name for kind in kinds}
    codes = dict(re.findall(r"(?m)^\| ([\d, ]+) \| (.*?) \|", text))
    by_name = {name: code for code, row in codes.items() for name in re.findall(r"\[(\w+)\]", row)}
    assert by_name.keys() == sections.keys()
    for kind in kinds - {TrainingInterrupted}:
        assert by_name[kind.name] == str(kind.exit_code)
        assert sections[kind.name].startswith(f"Exit code {kind.exit_code}. ")


def test_classes_of_the_module_have_names_of_their_own() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ScaleKDError)
    ]
    assert len({kind.name for kind in kinds}) == len(kinds)


def test_an_interruption_survives_pickling_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(TrainingInterrupted("stopped", 15)))
    assert (str(copy), copy.exit_code, copy.name) == ("stopped", 143, "Interrupted")


RAISED = [
    (UsageError("no such model"), "UsageError", 2),
    (DataError("no such\nfolder"), "DataError", 3),
    (CacheMismatch("another teacher"), "CacheMismatch", 4),
    (EnvironmentFault("disk full"), "EnvironmentFault", 5),
    (TrainingDiverged("nan"), "TrainingDiverged", 1),
    (TrainingInterrupted("stopped", 15), "Interrupted", 143),
    (OSError(errno.ENOSPC, "No space left"), "EnvironmentFault", 5),
    (KeyboardInterrupt(), "Interrupted", 130),
    (Terminated(), "Interrupted", 143),
    (click.UsageError("No such option"), "UsageError", 2),
    (ZeroDivisionError("division\x1b[2J by zero"), "InternalError", 1),
]


@pytest.mark.parametrize(("error", "name", "code"), RAISED, ids=lambda value: repr(value)[:30])
def test_a_failure_has_a_name_a_message_and_a_code_in_json_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str, code: int
) -> None:
    def fail(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(cli.group, "main", fail)
    ran = run("cache", "info", "c", "--json")
    assert ran.code == code
    assert ran.out.count("\n") == 1
    told = ran.json["error"]
    assert (told["name"], told["exit_code"]) == (name, code)
    assert "\n" not in told["message"]
    assert ran.out.isascii()
    line = f"scalekd: error: {name}: {told['message']}\n"
    assert ran.err.endswith(line)
    assert ("Traceback" in ran.err) == (ran.err != line) == (name == "InternalError")
    assert "\x1b" not in ran.err + ran.out
    silent = run("cache", "info", "c")
    assert (silent.code, silent.out) == (code, "")
    assert silent.err.endswith(line)


@pytest.mark.parametrize(
    ("arguments", "name", "code"),
    [
        (("cache", "info", "nowhere"), "DataError", 3),
        (("evaluate", "no_such_model", "--data-dir", "d"), "UsageError", 2),
        (("cache-teacher", "--modle", "swin_l"), "UsageError", 2),
        (("no-such-command",), "UsageError", 2),
        (("doctor", "--data-dir", "nowhere"), "DataError", 3),
        (("report", "nowhere", "--output", "r.html"), "UsageError", 2),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_real_failures_answer_in_json(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    name: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d" / "val").mkdir(parents=True)
    ran = run(*arguments, "--json")
    assert (ran.code, ran.json["error"]["name"], ran.json["error"]["exit_code"]) == (
        code,
        name,
        code,
    )
    assert f"scalekd: error: {name}: {ran.json['error']['message']}" in ran.err


def test_other_processes_of_a_run_leave_the_json_to_the_first(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    ran = run("cache", "info", tmp_path, "--json")
    assert ran.code
    assert ran.out == ""


def test_a_check_that_fails_keeps_its_result_beside_the_error(run: Run, cache_copy: Path) -> None:
    (cache_copy / "stray.txt").write_text("x")
    victim = next(path for path in sorted(cache_copy.glob("**/c/**/*")) if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    ran = run("cache", "verify", cache_copy, "--json")
    assert ran.code == 4
    lines = ran.out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result["error"]["name"] == "CacheCorrupt"
    assert result["problems"]
    assert ran.err == f"scalekd: error: CacheCorrupt: {result['error']['message']}\n"
