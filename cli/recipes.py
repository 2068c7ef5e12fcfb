"""``scalekd recipes``."""

import click

from scalekd.cli._options import json_option
from scalekd.cli._output import emit, table


@click.command("recipes")
@json_option
def command(*, as_json: bool) -> None:
    """List the published pairs that train-student --recipe takes."""
    from scalekd.pipelines.configure import describe_recipe, recipe_names

    found = [describe_recipe(name) for name in recipe_names()]
    columns = ("name", "teacher", "student", "epochs", "batch", "opt", "lr", "augmentation", "top1")
    rows = [columns, *(tuple(str(recipe[c] or "-") for c in columns) for recipe in found)]
    emit({"recipes": found}, table(rows), as_json=as_json)
