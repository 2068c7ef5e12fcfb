"""Command-line options made from the fields of a record: name, type, help and default.

A field's description is the option's help. Omitted options are absent from the
values, so that the recipe's value or the record's default is used.
"""

import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from scalekd.cli._options import ImageSizes, KeyValue, NumberRange, Numbers, Stages
from scalekd.image_options import ImageSize

_NAMES = {
    "batch_size": ("-b", "--batch-size"),
    "workers": ("-j", "--workers"),
    "initial_checkpoint": ("--initial-checkpoint", "--checkpoint"),
    "amp": ("--amp", "--precision"),
    "precision": ("--precision", "--amp"),
}
"""Option names of fields with several names or a different one, the same in all commands."""


_REPEATED = {"multiple": True, "callback": lambda context, parameter, values: values or None}
"""Settings of an option that may be repeated; its value is ``None`` if omitted."""

_SYNONYMS = {"no": "fp32", "fp32": "no"}
"""Synonyms of full precision: every command accepts both names."""


class GroupedCommand(click.Command):
    """Command whose help lists the options under the headings of their record."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            row = parameter.get_help_record(context)
            if row is not None and row[1]:  # the usage line names the arguments
                sections.setdefault(getattr(parameter, "heading", "Other"), []).append(row)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


class RecordOption(click.Option):
    """Option made from a field of a record.

    Args:
        field: Field whose description and default form the help.
        heading: Section of the help that lists the option.
    """

    def __init__(self, *arguments: Any, field: FieldInfo, heading: str, **settings: Any) -> None:
        self.heading, self.shown_default = heading, _shown_default(field)
        default = f"  [default: {self.shown_default}]" if self.shown_default else ""
        help_ = re.sub(r"\s*\n\s*", " ", field.description or "")
        settings["help"] = f"{help_}{default}"
        super().__init__(*arguments, **settings)


def record_options(
    record: type[BaseModel],
    *,
    leave_out: Iterable[str] = (),
    flag_values: Mapping[str, str] | None = None,
    required: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with one option for each field of a record, in order.

    Args:
        record: Record class. Its optional ``headings`` map the first field of each section of
            the help to the title of the section.
        leave_out: Fields without an option, such as arguments of the command.
        flag_values: Value of each option that may be given without one.
        required: Whether fields without default are required; a recipe can provide them instead.
    """
    headings: Mapping[str, str] = getattr(record, "headings", {})
    heading, options = "Options", []
    for name, field in _by_heading(record.model_fields, headings):
        heading = headings.get(name, heading)
        if name in leave_out:
            continue
        settings = {"required": required and field.is_required(), **_settings(field.annotation)}
        if flag_values and name in flag_values:
            settings |= {"is_flag": False, "flag_value": flag_values[name]}
        names = _NAMES.get(name, ("--" + name.replace("_", "-"),))
        if settings.pop("switch", False):
            names = (f"{names[0]}/--no-{names[0][2:]}",)
        options.append((names, name, {**settings, "field": field, "heading": heading}))

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for names, name, settings in reversed(options):
            function = click.option(*names, name, cls=RecordOption, **settings)(function)
        return function

    return decorate


def _by_heading(
    fields: Mapping[str, FieldInfo], headings: Mapping[str, str]
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields section by section, in the order of the headings."""
    names = list(fields)
    starts = sorted(names.index(name) for name in headings)
    ends = dict(zip(starts, [*starts[1:], len(names)], strict=True))
    for start in [names.index(name) for name in headings] or [0]:
        for name in names[start : ends.get(start, len(names))]:
            yield name, fields[name]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given; ``key=value`` pairs are joined into a mapping."""
    values = {name: value for name, value in options.items() if value is not None}
    for name, value in values.items():
        if value and isinstance(value, tuple) and all(isinstance(pair, _Pair) for pair in value):
            values[name] = dict(value)
    return values


class _Pair(tuple[str, Any]):
    """A key and its value."""


class SynonymChoice(click.Choice[str]):
    """Choice that accepts both names of full precision."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        synonym = _SYNONYMS.get(value)
        if value not in self.choices and synonym in self.choices:
            value = synonym
        return super().convert(value, param, ctx)


class _KeyValue(KeyValue):
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        return _Pair(super().convert(value, param, ctx))


def _settings(annotation: Any) -> dict[str, Any]:
    """Return click's settings for the type of a field."""
    if annotation == ImageSize:
        return {"type": ImageSizes()}
    if get_origin(annotation) is Annotated:
        return _settings(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _settings(str if str in kinds else kinds[0])
    arguments = get_args(annotation)
    if annotation is bool:
        return {"switch": True, "default": None}
    if get_origin(annotation) is Literal:
        return {"type": SynonymChoice(arguments)}
    if get_origin(annotation) is dict:
        return {"type": _KeyValue(), **_REPEATED}
    if get_origin(annotation) is tuple:
        if get_origin(arguments[0]) is Literal:
            return {"type": Stages()}
        if arguments == (int, int):
            return {"type": NumberRange()}
        return {**_REPEATED} if arguments[0] is str else {"type": Numbers()}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"type": KeyValue(dotted=True), **_REPEATED}
    return {"type": annotation if annotation in (int, float) else str}


def _shown_default(field: FieldInfo) -> str:
    """Format a default for the help; empty if there is no default or it is computed later."""
    value = None if field.is_required() or field.default_factory else field.default
    if value is None or value is False or value == () or isinstance(value, BaseModel):
        return ""
    if isinstance(value, ByteSize):
        return value.human_readable(decimal=True).replace(".0", "")
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is True:
        return "on"
    return f"{value:g}" if isinstance(value, float) else str(value)
