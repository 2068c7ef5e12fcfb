"""Print with control characters escaped, so that text from files cannot control the terminal."""

import contextlib
import io
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from scalekd.text import MAX_CELL, one_line, printable


def echo(line: str, *, err: bool = False) -> None:
    """Print one line, with unprintable characters escaped."""
    _write(printable(line), err=err)


def emit(result: dict[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Print the lines, or the result as one line of ASCII JSON."""
    if as_json:
        _write(json.dumps(result).replace("\x7f", "\\u007f"), err=False)
    else:
        for line in lines:
            echo(line)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns; the middle of an overlong cell is left out."""
    cells = [[printable(cell, limit=MAX_CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def complain(message: str) -> None:
    """Print an error as one line on standard error."""
    echo(f"scalekd: error: {one_line(message)}", err=True)


def complain_of_usage(error: click.ClickException) -> None:
    """Print click's error, which quotes arguments, with the usage of the command."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        context = error.ctx
        for line in context.get_usage().splitlines():
            echo(line, err=True)
        echo(f"Try '{context.command_path} {context.help_option_names[-1]}' for help.", err=True)
        echo("", err=True)
    echo(f"Error: {one_line(error.format_message())}", err=True)


def show_traceback(error: Exception) -> None:
    """Print the traceback of an unexpected error, with its text escaped."""
    for entry in traceback.format_exception(error):
        for line in entry.split("\n"):
            echo(line, err=True)


@contextlib.contextmanager
def escaping() -> Iterator[None]:
    """Escape warnings, log records, and characters that the output encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    formatwarning, factory = warnings.formatwarning, logging.getLogRecordFactory()

    def escaped_warning(message: Warning | str, *rest: Any, **named: Any) -> str:
        return formatwarning(_escaped(str(message)), *rest, **named)

    warnings.formatwarning = escaped_warning
    logging.setLogRecordFactory(_EscapedRecord)
    try:
        yield
    finally:
        warnings.formatwarning = formatwarning
        logging.setLogRecordFactory(factory)


class _EscapedRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return _escaped(super().getMessage())


def _escaped(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _write(line: str, *, err: bool) -> None:
    # click.echo would write UTF-8 to a stream whose encoding is ASCII.
    print(line, file=sys.stderr if err else sys.stdout, flush=True)
