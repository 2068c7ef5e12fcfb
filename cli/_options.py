"""Option types and printing that several commands share."""

import ast
import json
import re
from typing import Any, ClassVar, TypeVar

import click
from pydantic import BaseModel, ValidationError

from scalekd.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="End with one line of JSON on standard output."
)


class KeyValue(click.ParamType[Any]):
    """``key=value``, the value read as a Python literal or, failing that, as text."""

    name = "k=v"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not of the form key=value", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return key, text


class NumberRange(click.ParamType[Any]):
    """``A-B`` or ``A``: whole numbers, both ends included."""

    name = "A-B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
        if found is None:
            self.fail(f"{value!r} is not a range such as 0-15", param, ctx)
        first = int(found[1])
        return first, int(found[2]) if found[2] else first


class Stages(click.ParamType[Any]):
    """``3,4``, ``final`` or ``none``."""

    name = "STAGES"
    _KNOWN: ClassVar = {"3,4": (3, 4), "4": (4,), "final": (4,), "none": ()}

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if value not in self._KNOWN:
            self.fail(f"{value!r} is not one of {', '.join(self._KNOWN)}", param, ctx)
        return self._KNOWN[value]


def checked(model: type[Model], /, **values: Any) -> Model:
    """Build a configuration; what is wrong with it becomes one line.

    Raises:
        UsageError: A value is out of range or unknown.
    """
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        raise UsageError(f"{option}: {first['msg']} (got {first['input']!r})") from None


def emit(result: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """Print what a person reads, or one line of JSON."""
    if as_json:
        click.echo(json.dumps(result))
    else:
        for line in lines:
            click.echo(line)


def size(num_bytes: float) -> str:
    """A number of bytes for people: ``1.9 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
