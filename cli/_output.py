"""Print with control characters escaped, so that text from files cannot control the terminal."""

import contextlib
import io
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from pydantic_core import to_jsonable_python

from scalekd.errors import ScaleKDError
from scalekd.pipelines._notes import is_main_process
from scalekd.text import printable


class Result(Protocol):
    """Result of a command: a record, or a mapping of values that JSON can express."""

    def lines(self) -> Iterable[str]:
        """Return the lines to print."""


@runtime_checkable
class JudgedResult(Protocol):
    """A result that may describe problems, which decide the exit code."""

    def failure(self) -> ScaleKDError | None:
        """Return an error that describes the problems; ``None`` if there are none."""


def echo(line: str, *, err: bool = False) -> None:
    """Print one line, with unprintable characters escaped."""
    _write(printable(line), err=err)


class Reported(Exception):
    """Failure of a command whose result, with the error in its JSON, was printed already."""

    def __init__(self, failure: ScaleKDError) -> None:
        super().__init__(str(failure))
        self.failure = failure


def print_result(result: Result, *, as_json: bool) -> None:
    """Print a result as its lines, or as one line of ASCII JSON; the main process prints.

    Raises:
        Reported: The result describes problems.
    """
    failure = result.failure() if isinstance(result, JudgedResult) else None
    if is_main_process():
        if as_json:
            error = {} if failure is None else _described(failure)
            _write_json({**to_jsonable_python(result), **error})
        else:
            for line in result.lines():
                echo(line)
    if failure is not None:
        raise Reported(failure)


def emit_failure(error: ScaleKDError) -> None:
    """Print the name, message and exit code of an error as one line of ASCII JSON."""
    _write_json(_described(error))


def _described(error: ScaleKDError) -> dict[str, Any]:
    facts = {"name": error.name, "message": str(error), "exit_code": error.exit_code}
    return {"error": facts}


def print_error(error: ScaleKDError) -> None:
    """Print an error as one line on standard error."""
    echo(f"scalekd: error: {error.name}: {error}", err=True)


def show_traceback(error: BaseException) -> None:
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


def _write_json(result: dict[str, Any]) -> None:
    _write(json.dumps(result).replace("\x7f", "\\u007f"), err=False)


def _write(line: str, *, err: bool) -> None:
    # click.echo would write UTF-8 to a stream whose encoding is ASCII.
    print(line, file=sys.stderr if err else sys.stdout, flush=True)
