"""Command-line options made from the fields of a record: name, type, help and default.

A field's description is the option's help. Omitted options are absent from the
values, so that the recipe's value or the record's default is used.
"""

import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel, BeforeValidator, ByteSize
from pydantic.fields import FieldInfo

from scalekd.cli._options import KeyValue, NumberRange, Numbers, Parsed, Stages, checked
from scalekd.cli._output import Result, echo, print_result

Record = TypeVar("Record", bound=BaseModel)

_NAMES = {
    "batch_size": ("-b", "--batch-size"),
    "workers": ("-j", "--workers"),
    "checkpoint": ("--checkpoint", "--initial-checkpoint"),
    "initial_checkpoint": ("--initial-checkpoint", "--checkpoint"),
    "amp": ("--amp", "--precision"),
    "precision": ("--precision", "--amp"),
    "copy_files": ("--copy",),
    "class_name": ("--class",),
    "pass_index": ("--pass",),
}
"""Option names of fields with several names or a different one, the same in all commands."""


_REPEATED = {"multiple": True, "callback": lambda context, parameter, values: values or None}
"""Settings of an option that may be repeated; its value is ``None`` if omitted."""

_SYNONYMS = {"no": "fp32", "fp32": "no"}
"""Synonyms of full precision: every command accepts both names."""


def record_command(
    name: str,
    record: type[Record],
    *,
    arguments: Iterable[str] = (),
    leave_out: Iterable[str] = (),
) -> Callable[[Callable[[Record], Result]], click.Command]:
    """Make a command from a function that takes a record and returns what is printed.

    Args:
        name: Name of the command; the function's docstring is its help.
        record: Record class; :func:`record_options` makes options from its fields.
        arguments: Fields that are positional arguments, in order.
        leave_out: Fields without an option.
    """

    def decorate(function: Callable[[Record], Result]) -> click.Command:
        def run(*, as_json: bool, **options: Any) -> None:
            print_result(function(checked(record, **given(options))), as_json=as_json)

        decorated = json_option(run)
        left_out = (*arguments, *leave_out)
        decorated = record_options(record, leave_out=left_out, required=True)(decorated)
        for argument in reversed(tuple(arguments)):
            field = record.model_fields[argument]
            num_values = -1 if get_origin(field.annotation) is tuple else 1
            required = field.is_required()
            decorated = click.argument(argument, nargs=num_values, required=required)(decorated)
        return click.command(name, cls=GroupedCommand, help=function.__doc__)(decorated)

    return decorate


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with ``--json``, the last option in the help."""
    text = "End with one line of JSON on standard output."
    return click.option("--json", "as_json", is_flag=True, help=text)(function)


_HELP_ALL = "--help-all"
_COMMON = "Common options"
_SHORT_HELP = 16  # a command with at most as many options needs no --help-all


class GroupedCommand(click.Command):
    """Command whose help lists the common options of its record, and all with ``--help-all``.

    All options are listed under the headings of their record, the common ones first.
    """

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        parameters = super().get_params(context)
        if len(parameters) <= _SHORT_HELP or not self._has_common():
            return parameters
        show_all = click.Option(
            [_HELP_ALL],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_all_options,
            help="Show every option and exit.",
        )
        return [*parameters[:-1], show_all, parameters[-1]]

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = self.get_params(context)
        in_short = any(_HELP_ALL in parameter.opts for parameter in parameters)
        in_short &= not context.meta.get(_HELP_ALL, False)
        sections: dict[str, list[tuple[str, str]]] = {_COMMON: []} if self._has_common() else {}
        num_left_out = 0
        for parameter in parameters:
            row = parameter.get_help_record(context)
            if row is None or not row[1]:  # the usage line names the arguments
                continue
            heading = getattr(parameter, "heading", "Other")
            if getattr(parameter, "is_common", False):
                heading = _COMMON
            elif in_short and heading != "Other":
                num_left_out += 1
                continue
            sections.setdefault(heading, []).append(row)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)
        if num_left_out:
            formatter.write_paragraph()
            formatter.write_text(f"{_HELP_ALL} describes {num_left_out} further options.")

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            advice = _ELSEWHERE.get(error.option_name)
            if advice is None or any(error.option_name in p.opts for p in self.params):
                raise
            raise click.UsageError(
                f"No such option: {error.option_name}; {advice}", context
            ) from None

    def _has_common(self) -> bool:
        return any(getattr(parameter, "is_common", False) for parameter in self.params)


def _print_all_options(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    del parameter
    if value and not context.resilient_parsing:
        context.meta[_HELP_ALL] = True
        for line in context.get_help().splitlines():
            echo(line)
        context.exit()


def _explain_views(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """Print the grammar of view policies for ``--aug help``, whatever else is given."""
    del parameter
    if value != "help" or context.resilient_parsing:
        return value
    from scalekd.views import POLICY_GRAMMAR

    for line in POLICY_GRAMMAR.splitlines():
        echo(line)
    context.exit()


_OF_THE_CACHE = "augmentation belongs to the cache: give --aug to cache-teacher"
_ELSEWHERE = {
    **dict.fromkeys(
        ("--aa", "--hflip", "--vflip", "--color-jitter", "--reprob", "--scale", "--ratio"),
        _OF_THE_CACHE,
    ),
    **dict.fromkeys(
        ("--mixup", "--cutmix", "--aug-repeats"),
        "the student sees the views that the teacher saw, which are not mixed",
    ),
    "--dataset": "give --data-dir (hfds/NAME for Hugging Face data sets)",
}
"""What to do instead of options that users of timm expect."""


class RecordOption(click.Option):
    """Option made from a field of a record.

    Args:
        field: Field whose description and default form the help.
        heading: Section of the help that lists the option.
        is_common: Whether the help lists the option first, and without ``--help-all``.
    """

    def __init__(
        self,
        *arguments: Any,
        field: FieldInfo,
        heading: str,
        is_common: bool = False,
        **settings: Any,
    ) -> None:
        self.heading, self.shown_default = heading, _shown_default(field)
        self.is_common = is_common
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
            the help to the title of the section; its optional ``common`` names the fields whose
            options the help lists first.
        leave_out: Fields without an option, such as arguments of the command.
        flag_values: Value of each option that may be given without one.
        required: Whether fields without default are required; a recipe can provide them instead.
    """
    options = []
    for heading, name, field in _by_heading(record):
        if name in leave_out:
            continue
        settings = {"required": required and field.is_required(), **_settings(field.annotation)}
        if flag_values and name in flag_values:
            settings |= {"is_flag": False, "flag_value": flag_values[name]}
        names = _NAMES.get(name, ("--" + name.replace("_", "-"),))
        if settings.pop("switch", False):
            names = (f"{names[0]}/--no-{names[0][2:]}",)
        settings |= {"heading": heading, "is_common": name in getattr(record, "common", ())}
        if name == "aug":
            settings |= {"is_eager": True, "callback": _explain_views}
        options.append((names, name, {**settings, "field": field}))

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for names, name, settings in reversed(options):
            function = click.option(*names, name, cls=RecordOption, **settings)(function)
        return function

    return decorate


def _by_heading(record: type[BaseModel]) -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield heading, name and field section by section, in the order of the headings."""
    headings: Mapping[str, str] = getattr(record, "headings", {})
    sections: dict[str, list[str]] = {title: [] for title in headings.values()} or {"Options": []}
    title = next(iter(sections))
    for name in record.model_fields:
        title = headings.get(name, title)
        sections[title].append(name)
    for title, names in sections.items():
        for name in names:
            yield title, name, record.model_fields[name]


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
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        parsers: list[Any] = [mark.func for mark in marks if isinstance(mark, BeforeValidator)]
        return {"type": Parsed(parsers[0])} if parsers else _settings(inner)
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
