"""``scalekd recipes``."""

from typing import Any

import click

from scalekd.cli._options import checked, json_option
from scalekd.cli._output import emit, table

_COLUMNS = ("recipe", "epochs", "batch", "opt", "lr", "top-1", "gain", "released")


@click.command("recipes")
@click.argument("name", required=False)
@click.option("--gpus", default=8, show_default=True, help="Number of GPUs used by both commands.")
@click.option(
    "--passes", default=8, show_default=True, help="Number of views cached for each image."
)
@click.option(
    "--online", is_flag=True, help="Draw fresh views in every epoch, with a live teacher."
)
@click.option("--baseline", is_flag=True, help="Train the student alone, on the recipe's views.")
@click.option(
    "--tflops",
    default=100.0,
    show_default=True,
    help="Assumed throughput of a GPU in TFLOP/s, to estimate hours.",
)
@json_option
def command(*, name: str | None, as_json: bool, **options: Any) -> None:
    """List the published pairs, or show the commands and the cost of the recipe NAME."""
    from scalekd.pipelines.recipe_plan import RecipePlanConfig, plan_recipe

    if name is not None:
        plan = plan_recipe(checked(RecipePlanConfig, name=name, **options))
        emit(plan.model_dump(mode="json"), plan.lines(), as_json=as_json)
        return
    from scalekd.pipelines.configure import describe_recipe, recipe_names

    recipes = [describe_recipe(recipe) for recipe in recipe_names()]
    lines = [
        *table([_COLUMNS, *map(_row, recipes)]),
        "top-1 as published, and the gain over the same student trained alone.",
        "Not released: removed from the authors' code, or added here (resnet50-kd).",
        "`scalekd recipes NAME` prints the commands of a recipe, and what they cost.",
    ]
    emit({"recipes": recipes}, lines, as_json=as_json)


def _row(recipe: dict[str, Any]) -> list[str]:
    figures = (recipe[name] for name in ("top1", "gain"))
    return [
        *(str(recipe[name]) for name in ("name", "epochs", "batch", "opt", "lr")),
        *("-" if figure is None else f"{figure:.2f}" for figure in figures),
        "yes" if recipe["released"] else "no",
    ]
