"""Reference of the command line as Markdown, made from the commands themselves."""

from collections.abc import Iterator

import click

from scalekd.cli.main import group
from scalekd.text import markdown

_OPENING = """# Command line

Made from the commands. `scalekd COMMAND --help` shows the common options of a command, and
`--help-all` every option. Exit codes and errors are described in [errors](errors.md).
"""


def reference() -> str:
    """Return a page with a section for each command: usage, description, every option."""
    return "\n".join([_OPENING, *_sections(group, click.Context(group, info_name="scalekd"))])


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield from _sections(inner, click.Context(inner, info_name=name, parent=context))
        return
    yield f"## {context.command_path}\n"
    pieces = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{context.command_path} {pieces}\n```\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield markdown(paragraph) + "\n"
    heading = None
    for option in command.params:
        record = option.get_help_record(context)
        if record is None or not record[1]:
            continue
        title = getattr(option, "heading", "Other")
        if title != heading:
            heading = title
            yield f"\n**{markdown(title)}**\n\n| option | meaning |\n| --- | --- |"
        names, text = record
        yield f"| `{names.replace('|', '&#124;')}` | {markdown(text)} |"
    yield ""
