"""Options of every command that opens an image set, made from their record."""

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click

from scalekd.image_options import ImageOptions

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def image_options(*, with_defaults: bool = True) -> _Decorator:
    """Add ``--labels``, ``--input-key``, ``--target-key`` and ``--key-column``.

    Args:
        with_defaults: Use the defaults of the record; if false, an omitted option is ``None``.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(ImageOptions.model_fields.items()):
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            command = click.option(
                f"--{name.replace('_', '-')}",
                type=click.Choice(choices) if choices else str,
                default=field.default if with_defaults else None,
                help=(field.description or "")
                + (f"  [default: {field.default}]" if field.default is not None else ""),
            )(command)
        return command

    return decorate


def taken_options(options: dict[str, Any]) -> ImageOptions:
    """Remove the options of :func:`image_options` from ``options`` and return them as a record."""
    return ImageOptions(**{name: options.pop(name) for name in ImageOptions.model_fields})
