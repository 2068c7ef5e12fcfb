"""Every `scalekd` command line in the documents is one that the command line accepts."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from scalekd.cli.main import group

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_NOT_DOCUMENTATION = {"LOG.md"}


def _command_lines(text: str) -> Iterator[str]:
    """Shell lines of fenced blocks, with continuation lines joined and output left out."""
    for fence, block in re.findall(r"(?ms)^```(sh|bash|console)\n(.*?)^```$", text):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if fence == "console" and not line.startswith("$ "):
                continue
            yield line.removeprefix("$ ")


def _arguments(line: str) -> list[str] | None:
    """Arguments of `scalekd` in a shell line; ``None`` if it is another command, or a template."""
    found = re.search(r"(?:^|\s|-m )scalekd ([a-z].*)", line)
    if found is None or re.search(r"…|\[@\]|\.\.\. |<\w+>", line):
        return None
    words = shlex.split(found[1].split(" | ")[0], comments=True)
    return words[: next((n for n, w in enumerate(words) if w in ("&", "&&", ">", "|")), len(words))]


def _checked(arguments: list[str]) -> None:
    context = click.Context(group, info_name="scalekd")
    command: click.Command = group
    while isinstance(command, click.Group):
        name, inner, arguments = command.resolve_command(context, arguments)
        assert inner is not None
        context = click.Context(inner, info_name=name, parent=context)
        command = inner
    with contextlib.suppress(click.exceptions.Exit):  # --help
        command.make_context(command.name, list(arguments), parent=context.parent)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_command_lines_of_a_document_are_accepted(document: Path) -> None:
    if document.name in _NOT_DOCUMENTATION:
        pytest.skip("a log states commands as they were")
    for line in _command_lines(document.read_text(encoding="utf-8")):
        arguments = _arguments(line)
        if arguments is None:
            continue
        try:
            _checked([re.sub(r"\$\{?\w+\}?", "1", argument) for argument in arguments])
        except click.ClickException as error:
            pytest.fail(f"{document.name}: {line}: {error.format_message()}")


def test_command_lines_are_found_and_wrong_ones_refused() -> None:
    lines = [
        line
        for document in DOCUMENTS
        for line in _command_lines(document.read_text(encoding="utf-8"))
        if _arguments(line)
    ]
    assert len(lines) > 25
    with pytest.raises(click.UsageError):
        _checked(["cache-teacher", "--modle", "swin_l"])
    with pytest.raises(click.UsageError):
        _checked(["cache", "inspect", "x"])
