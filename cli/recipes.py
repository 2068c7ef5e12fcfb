"""``scalekd recipes``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._run_options import RecipesConfig

if TYPE_CHECKING:
    from scalekd.pipelines.recipe_plan import RecipeList, RecipePlan


@record_command("recipes", RecipesConfig, arguments=("name",))
def command(config: RecipesConfig) -> "RecipeList | RecipePlan":
    """List the published pairs, or show the commands and the cost of the recipe NAME."""
    from scalekd.pipelines.recipe_plan import list_or_plan_recipes

    return list_or_plan_recipes(config)
