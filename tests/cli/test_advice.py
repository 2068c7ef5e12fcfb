"""A message advises only options that the command at hand has, or names the other command."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import scalekd
from scalekd.cli.main import group
from scalekd.errors import DataError, ScaleKDError, UsageError, rewording

_ROOT = Path(scalekd.__file__).parent
_REPOSITORY = _ROOT.parent
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
_OTHER_COMMAND = re.compile(r"cache-teacher|train-student|cache extend|write a cache|write tars")
_SHARED = {"trained.py"}  # in one of the folders below, for other commands as well
# Modules whose messages are those of one command.
_MODULES = {
    "train-student": ["pipelines/train_student.py", "pipelines/configure.py", "scalekd/training"],
    "evaluate": ["pipelines/evaluate.py", "scalekd/evaluation"],
    "cache-teacher": ["pipelines/cache_teacher.py", "pipelines/_classes.py"],
    "cache extend": ["pipelines/extend_cache.py"],
    "export": ["pipelines/export.py", "scalekd/export"],
}


def _commands(command: click.Command, path: str = "") -> Iterator[tuple[str, set[str]]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _commands(inner, f"{path} {name}".strip())
    else:
        options = (opt for p in command.params for opt in (*p.opts, *p.secondary_opts))
        yield path, set(options)


def _messages(module: Path) -> Iterator[tuple[int, str]]:
    """Texts that errors are raised with, joined where they are formatted."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            texts = [
                part.value
                for part in ast.walk(node.exc)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            yield node.lineno, " ".join(texts)


@pytest.mark.parametrize("command", _MODULES)
def test_options_in_a_commands_messages_are_its_own(command: str) -> None:
    options = dict(_commands(group))[command]
    modules = [_REPOSITORY / name for name in _MODULES[command]]
    files = [
        f for module in modules for f in ([module] if module.is_file() else module.glob("*.py"))
    ]
    num_options = 0
    for file in (file for file in files if file.name not in _SHARED):
        for line, text in _messages(file):
            found = set(_OPTION.findall(text))
            num_options += len(found)
            foreign = found - options
            assert not foreign or _OTHER_COMMAND.search(text), f"{file}:{line}: {foreign}"
    assert num_options or command == "export"


def test_a_message_of_a_shared_part_is_reworded_and_keeps_its_kind() -> None:
    with (
        pytest.raises(DataError, match=r"^give --teacher-checkpoint FILE$") as raised,
        rewording({"--checkpoint": "--teacher-checkpoint", ", or --no-pretrained": ""}),
    ):
        raise DataError("give --checkpoint FILE, or --no-pretrained")
    assert raised.value.exit_code == DataError.exit_code
    same = UsageError("give --seed")
    with pytest.raises(ScaleKDError) as kept, rewording({"--checkpoint": "x"}):
        raise same
    assert kept.value is same
