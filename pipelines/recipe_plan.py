"""List the published recipes, or plan one: print its two commands and their cost.

scalekd recipes swin_l-resnet50d --gpus 8
"""

import shlex
from typing import Any

from pydantic import BaseModel

from scalekd.errors import UsageError
from scalekd.pipelines._run_options import RecipesConfig
from scalekd.pipelines.configure import (
    batch_norm_views,
    departures_of,
    describe_recipe,
    recipe_names,
    train_config,
)
from scalekd.text import counted, table
from scalekd.training import TrainConfig

IMAGENET_SAMPLES = 1_281_167
_WIDTH = 78
_COLUMNS = ("recipe", "epochs", "batch", "opt", "lr", "top-1", "gain", "released")
_FIGURES = ("top1", "gain")


class RecipePlanConfig(RecipesConfig):
    """Options of ``scalekd recipes NAME``."""

    name: str
    """Name of a shipped recipe."""


class RecipeCost(BaseModel):
    """Operations of both commands on ImageNet-1K, and hours at the rate of ``--tflops``."""

    cache_exaflop: float
    train_exaflop: float
    cache_hours: float
    train_hours: float


class RecipePlan(BaseModel):
    """A recipe, its commands as argument lists, and their cost.

    ``cache_command`` is empty if no cache is needed.
    """

    recipe: dict[str, Any]
    config: RecipePlanConfig
    cache_command: list[str]
    train_command: list[str]
    notes: list[str]
    cost: RecipeCost

    @property
    def departures(self) -> list[str]:
        """Differences from the reference; those of the teacher do not concern a baseline."""
        objective = "none" if self.config.baseline else ""
        return [*departures_of(self.recipe, objective), *self.notes]

    def lines(self) -> list[str]:
        """Return the lines to print, at most 80 columns wide; the commands can be pasted."""
        recipe, config, cost = self.recipe, self.config, self.cost
        side, commit = recipe["teacher_img_size"], recipe["reference"]
        origin = f"the authors' code, commit {commit}" if commit else "made here, not released"
        facts = {
            "teacher": [recipe["teacher_model"], f"at {side} x {side} px"],
            "student": [recipe["student"]],
            "top-1": [_figures(recipe)],
            "from": [origin],
            "departs": [line for text in self.departures for line in _broken(text)],
            "cost": [
                f"{_short(cost.cache_exaflop)} EFLOP to cache,"
                f" {_short(cost.train_exaflop)} to train:"
                f" {cost.cache_hours:.1f} and {cost.train_hours:.1f} hours",
                f"on {counted(config.gpus, 'GPU')} of {config.tflops:g} sustained TFLOP/s"
                " (--tflops)",
            ],
        }
        lines = [recipe["name"]]
        for name, texts in facts.items():
            for index, text in enumerate(texts):
                lines.append(f"  {name if index == 0 else '':<9}{text}")
        lines += ["", "# IMAGENET is a folder with train/CLASS and val/CLASS."]
        if self.cache_command:
            lines += [*_wrapped(self.cache_command), ""]
        return [*lines, *_wrapped(self.train_command)]


class RecipeList(BaseModel):
    """The shipped recipes, each as :func:`describe_recipe` describes it."""

    recipes: list[dict[str, Any]]

    def lines(self) -> list[str]:
        """Return a table and its explanation."""
        rows = [
            [
                *(str(recipe[name]) for name in ("name", "epochs", "batch", "opt", "lr")),
                *("-" if recipe[name] is None else f"{recipe[name]:.2f}" for name in _FIGURES),
                "yes" if recipe["released"] else "no",
            ]
            for recipe in self.recipes
        ]
        return [
            *table([_COLUMNS, *rows]),
            "top-1 as published, and the gain over the same student trained alone.",
            "Not released: removed from the authors' code, or added here (resnet50-kd).",
            "`scalekd recipes NAME` prints the commands of a recipe, and what they cost.",
        ]


def list_or_plan_recipes(config: RecipesConfig) -> RecipeList | RecipePlan:
    """List all recipes, or plan the one that is named.

    Raises:
        UsageError: An option of a plan is given without a name, or see :func:`plan_recipe`.
    """
    if config.name is None:
        for name, field in RecipesConfig.model_fields.items():
            if getattr(config, name) != field.default:
                raise UsageError(
                    f"--{name}: plans one recipe; name it, as in `scalekd recipes NAME`"
                )
        return RecipeList(recipes=[describe_recipe(name) for name in recipe_names()])
    return plan_recipe(RecipePlanConfig(**config.model_dump()))


def plan_recipe(config: RecipePlanConfig) -> RecipePlan:
    """Plan a recipe.

    Raises:
        UsageError: The recipe does not exist, the options exclude each other, or the published
            batch cannot be divided by the number of GPUs.
    """
    if config.name not in recipe_names():
        # A recipe file of the user has neither a teacher nor published figures; check its values.
        train_config(config.name, {"model": "", "output": ""})
        raise UsageError(f"{config.name}: is not a shipped recipe, so it cannot be planned")
    recipe = describe_recipe(config.name)
    published = train_config(config.name, {"output": ""})
    return RecipePlan(
        recipe=recipe,
        config=config,
        cache_command=_cache_command(config, recipe, published),
        train_command=_train_command(config, recipe, published),
        notes=_notes(config, recipe, published),
        cost=_cost(config, recipe),
    )


def _cache_command(
    config: RecipePlanConfig, recipe: dict[str, Any], published: TrainConfig
) -> list[str]:
    if config.online and config.baseline:
        return []  # fresh views need no teacher
    kept = not (config.online or config.baseline)
    logits = "full" if kept and published.distillation.kd else "none"
    passes = 1 if config.online else config.passes
    command = [*_launcher(config.gpus), "cache-teacher", "--model", recipe["teacher"]]
    command += ["--img-size", str(recipe["teacher_img_size"])]
    command += ["--data-dir", "IMAGENET", "--aug", recipe["augmentation"]]
    if recipe["interpolation"] != "bicubic":
        command += ["--interpolation", recipe["interpolation"]]
    command += ["--stages", "final" if kept else "none", "--logits", logits]
    return [*command, "--passes", str(passes), "--output", _cache_name(config, recipe)]


def _train_command(
    config: RecipePlanConfig, recipe: dict[str, Any], published: TrainConfig
) -> list[str]:
    command = [*_launcher(config.gpus), "train-student", "--recipe", recipe["name"]]
    if not (config.online and config.baseline):
        command += ["--cache", _cache_name(config, recipe)]
    command += ["--data-dir", "IMAGENET"]
    batch, accumulated = _batch(config, recipe, published)
    if batch != published.batch_size:
        command += ["--batch-size", str(batch)]
    if accumulated != published.grad_accum_steps:
        command += ["--grad-accum-steps", str(accumulated)]
    if config.baseline:
        command += ["--objective", "none"]
        command += ["--aug", recipe["augmentation"]] if config.online else []
    elif config.online:
        command.append("--online")
    run = f"{recipe['name']}-{'alone' if config.baseline else 'run'}"
    return [*command, "--output", run]


def _batch(
    config: RecipePlanConfig, recipe: dict[str, Any], published: TrainConfig
) -> tuple[int, int]:
    """Divide an update into batches of each GPU: their size, and their number."""
    total = recipe["batch"]
    if total % config.gpus:
        raise UsageError(
            f"--gpus {config.gpus}: {recipe['name']} makes an update of {total} views; give a"
            " number of GPUs that divides it"
        )
    if config.gpus > recipe["processes"] or recipe["processes"] % config.gpus:
        return total // config.gpus, 1
    return published.batch_size, published.grad_accum_steps * recipe["processes"] // config.gpus


def _notes(config: RecipePlanConfig, recipe: dict[str, Any], published: TrainConfig) -> list[str]:
    """Describe differences from the reference that follow from the options."""
    notes = []
    reused = recipe["epochs"] / config.passes
    if not config.online and reused > 1:
        notes.append(
            f"every view is trained on {reused:.3g} times (reference: fresh views; --online)"
        )
    objective = "none" if config.baseline else published.objective
    batch, _ = _batch(config, recipe, published)
    here = published.model_copy(update={"batch_size": batch})
    seen = batch_norm_views(here, config.gpus, objective)
    there = batch_norm_views(published, recipe["processes"], objective)
    if seen != there:
        notes.append(
            f"batch norm sees {seen} views on {counted(config.gpus, 'GPU')} (reference: {there})"
        )
    return notes


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _launcher(gpus: int) -> list[str]:
    if gpus == 1:
        return ["scalekd"]
    return ["torchrun", "--standalone", "--nproc-per-node", str(gpus), "-m", "scalekd"]


def _cache_name(config: RecipePlanConfig, recipe: dict[str, Any]) -> str:
    kind = "-views" if config.online or config.baseline else ""
    return f"{recipe['name']}-cache{kind}"


def _cost(config: RecipePlanConfig, recipe: dict[str, Any]) -> RecipeCost:
    """Count the operations of the teacher in the cache, and of student and live teacher."""
    gflop = recipe["gflop"]
    cached = 0 if config.online or config.baseline else config.passes
    step = gflop["student"] if config.baseline else gflop["step"]
    if config.online and not config.baseline:
        step += gflop["teacher"]
    views = IMAGENET_SAMPLES / 1e9
    cache, train = gflop["teacher"] * cached * views, step * recipe["epochs"] * views
    per_hour = config.gpus * config.tflops * 3600 / 1e6
    return RecipeCost(
        cache_exaflop=cache,
        train_exaflop=train,
        cache_hours=cache / per_hour,
        train_hours=train / per_hour,
    )


def _figures(recipe: dict[str, Any]) -> str:
    if recipe["top1"] is None:
        return "not published"
    text = f"{recipe['top1']:.2f} % as published"
    if recipe["gain"] is None:
        return text
    return f"{text}, {recipe['top1_alone']:.2f} % when trained alone, gain {recipe['gain']:.2f}"


def _broken(departure: str) -> list[str]:
    """Split a departure into what is done here and what the reference does."""
    first, _, rest = departure.partition(" (reference: ")
    return [first, f"(reference: {rest}"] if rest else [first]


def _wrapped(command: list[str]) -> list[str]:
    """Break a command into lines; an option and its value stay on one line."""
    words: list[str] = []
    for word in map(shlex.quote, command):
        if words and words[-1].startswith("--") and not word.startswith("-"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _WIDTH - 2:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
