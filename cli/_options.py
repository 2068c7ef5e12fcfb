"""Option types that several commands share."""

import ast
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import click
import yaml
from pydantic import BaseModel, ValidationError

from scalekd.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)


class KeyValue(click.ParamType[Any]):
    """``key=value``; see :func:`parse_value`. ``dotted`` allows keys such as ``stage3.heads``."""

    name = "k=v"

    def __init__(self, *, dotted: bool = False) -> None:
        self._dotted = dotted

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        key, equals, text = str(value).partition("=")
        owner = r"(?:[\w-]+\.)*" if self._dotted else ""  # names of teachers may have a hyphen
        name = re.fullmatch(rf"{owner}(\w+)", key)
        if not equals or name is None or not name[1].isidentifier():
            form = "key=value or stage3.key=value" if self._dotted else "key=value"
            self.fail(f"{value!r} is not of the form {form}", param, ctx)
        return key, parse_value(text)


_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("null", "none", "~"), None),
}


def parse_value(text: str) -> Any:
    """Read a value of ``key=value`` as YAML would, in any case: ``false``, ``1e-3``, ``[2, 2]``.

    Python literals are also read; any other text is returned unchanged.
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    if text.startswith("[") and text.endswith("]"):
        try:
            return _parsed(
                yaml.load(text, Loader=yaml.BaseLoader)
            )  # BaseLoader gives strings and lists only
        except (yaml.YAMLError, RecursionError):
            pass
    return text


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return [_parsed(item) for item in value]
    return parse_value(value) if isinstance(value, str) else value


class Parsed(click.ParamType[Any]):
    """Text that a function parses, such as an image size; it raises ``ValueError``."""

    name = "text"

    def __init__(self, parse: Callable[[Any], Any]) -> None:
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


class Numbers(click.ParamType[Any]):
    """Numbers separated by commas or spaces."""

    name = "X,Y"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).replace(",", " ").split())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.9,0.999", param, ctx)


class NumberRange(click.ParamType[Any]):
    """``A-B`` or ``A``: whole numbers, both ends included."""

    name = "A-B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
        if match is None:
            self.fail(f"{value!r} is not a range such as 0-15", param, ctx)
        first = int(match[1])
        return first, int(match[2]) if match[2] else first


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
    """Build a configuration; report the first invalid value in one line.

    Raises:
        UsageError: A value is out of range or unknown.
    """
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        raise UsageError(f"{option}: {first['msg']} (got {first['input']!r})") from None
