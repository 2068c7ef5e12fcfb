"""Options of every command that opens an image set, made from their record."""

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click

from scalekd.images.options import ImageOptions

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--labels``, ``--input-key``, ``--target-key`` and ``--key-column``.

    The value of an option that is not given is ``None``.
    """
    for name, field in reversed(ImageOptions.model_fields.items()):
        kind = field.annotation
        choices = get_args(kind) if get_origin(kind) is Literal else None
        text = field.description or ""
        if choices:
            text += f"  [default: {field.default}]"
        option = click.option(
            f"--{name.replace('_', '-')}",
            type=click.Choice(choices) if choices else str,
            default=None,
            help=text,
        )
        command = option(command)
    return command
