"""Make a training configuration from a recipe and command-line options; options take precedence.

A recipe is a YAML file of fields of `TrainConfig`, with an ``_about`` section that describes the
recipe. The package ships recipes in ``recipes/``, next to this file.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scalekd.cache.reading.reader import read_manifest
from scalekd.errors import UsageError
from scalekd.pipelines._initial import inherited_settings
from scalekd.storage import open_storage
from scalekd.teachers import resolve_model_name
from scalekd.training.config import TrainConfig, read_yaml_mapping
from scalekd.views import ViewPolicy

# Settings that a run may choose without departing from the recipe, and settings that
# departures_from_recipe compares itself. Every other setting belongs to the recipe.
_NOT_OF_A_RECIPE = frozenset(
    {"recipe", "cache", "data_dir", "aug", "split", "val_split", "val_cache", "local_cache"}
    | {"local_cache_size", "num_classes", "class_map", "targets", "online", "teacher"}
    | {"teacher_checkpoint", "batch_size", "grad_accum_steps", "grad_checkpointing"}
    | {"tail_checkpointing", "channels_last", "torchcompile", "seed", "workers", "output", "resume"}
    | {"eval_interval", "checkpoint_hist", "recovery_interval", "log_interval", "log_with"}
)
RECIPES = Path(__file__).parent / "recipes"
ABOUT = "_about"


def train_config(recipe: str | None, flags: Mapping[str, Any]) -> TrainConfig:
    """Make the configuration of a run.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        flags: Values given on the command line, without those left at their default; the value
            of ``distillation`` is a list of ``(dotted name, value)``. Model arguments are added to
            the recipe's, which are left out where ``model`` is another student.

    Raises:
        UsageError: Unknown recipe, name or value.
    """
    values = {} if recipe is None else read_recipe(recipe)
    if recipe is not None:
        # Checked on its own first, so that an error names the file and not the flags.
        TrainConfig.from_mapping({"model": "", "output": "", **values}, source=f"recipe {recipe}")
    flags = dict(flags)
    teachers = str(flags.get("targets") or values.get("targets") or "").split(",")
    changes = flags.pop("distillation", ())
    distillation = _nested(values.get("distillation", {}), changes, [n.strip() for n in teachers])
    if flags.get("model", values.get("model")) != values.get("model"):
        values.pop("model_kwargs", None)  # they are of the recipe's own student
    elif "model_kwargs" in flags:
        flags["model_kwargs"] = {**values.get("model_kwargs", {}), **flags["model_kwargs"]}
    merged = {**values, **flags, "recipe": recipe}
    if initial := merged.get("initial_checkpoint"):
        settings = inherited_settings(str(initial), merged)
        model_kwargs = settings.pop("model_kwargs", None)
        merged = {**settings, **merged}
        if model_kwargs is not None:
            merged["model_kwargs"] = model_kwargs
    if distillation:
        merged["distillation"] = distillation
    return TrainConfig.from_mapping(merged, source=None)


def read_recipe(name: str) -> dict[str, Any]:
    """Read the values of a recipe by field of `TrainConfig`, without its description."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        known = recipe_names()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise UsageError(
            f"--recipe {name}: neither a shipped recipe nor a YAML file; there is "
            f"{', '.join(near) or 'no shipped recipe'}"
        )
    values = {key.replace("-", "_"): value for key, value in read_yaml_mapping(path).items()}
    values.pop(ABOUT, None)
    return values


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_about(name: str) -> dict[str, Any]:
    """Return the ``_about`` section of a recipe: teacher, views, published figures, departures."""
    about: dict[str, Any] = read_yaml_mapping(RECIPES / f"{name}.yaml")[ABOUT]
    return about


def departures_from_recipe(name: str, config: TrainConfig, *, world_size: int) -> list[str]:
    """Describe how a run differs from the published recipe, one sentence for each difference.

    Args:
        name: Name of the recipe, as given to ``--recipe``.
        config: Configuration of the run.
        world_size: Number of processes of the run.

    Raises:
        DataError, CacheError: There is no cache to train from, or it is damaged.
    """
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        return []  # a recipe file of the user
    about, published = recipe_about(name), train_config(name, {"output": ""})
    manifest = read_manifest(open_storage(config.cache)) if config.cache else None
    departures = []
    if about["reference"] is None:
        departures.append(f"--recipe {name}: was not released by the authors")
    if own := departures_of(about, config.objective):
        departures.append(f"--recipe {name}: {'; '.join(own)}; docs/departures.md has the reasons")

    def compare(what: str, here: object, there: object, advice: str) -> None:
        if here != there:
            departures.append(
                f"--recipe {name}: {what} is {there} as published, {here} here; {advice}"
            )

    batch = config.batch_size * config.grad_accum_steps * world_size
    compare(
        "views an update",
        batch,
        published.batch_size * published.grad_accum_steps * about["processes"],
        f"its rate of {published.lr:g} belongs to that number: launch more processes, or change"
        " --batch-size, --grad-accum-steps or --lr",
    )
    wanted_views = batch_norm_views(published, about["processes"], config.objective)
    if wanted_views is not None:
        compare(
            "the number of views that batch norm sees",
            batch_norm_views(
                published.model_copy(
                    update={"batch_size": config.batch_size, "sync_bn": config.sync_bn}
                ),
                world_size,
                config.objective,
            ),
            wanted_views,
            "it is --batch-size, times the processes with --sync-bn",
        )
    settings = published.model_dump()
    changes = [
        f"{option} is {value!r} here ({settings[option]!r} as published)"
        for option, value in config.model_dump().items()
        if option not in _NOT_OF_A_RECIPE and value != settings[option]
    ]
    if changes:
        departures.append(f"--recipe {name}: {'; '.join(changes)}")
    wanted = ViewPolicy.parse(about["augmentation"], interpolation=about["interpolation"])
    if manifest is None and config.objective == "none":
        drawn = str(ViewPolicy.parse(config.aug or "crop-flip"))
        compare("the augmentation", drawn, str(wanted), f"give --aug {wanted} to have it")
    if manifest is not None:
        identity = manifest.plan.identity
        teacher = resolve_model_name(about["teacher"])[0].partition(".")[0]
        side = about["teacher_img_size"]
        size = "{} x {} px".format(*identity.views.view_size)
        if config.objective != "none":
            architecture = identity.teacher["architecture"]
            compare("the teacher", architecture, teacher, "that is another pair")
            advice = f"write a cache with --img-size {side} to have it"
            compare("the teacher's image size", size, f"{side} x {side} px", advice)
        policy = ViewPolicy.from_config(identity.views.policy)
        compare("the augmentation", str(policy), str(wanted), "write a cache with --aug to have it")
        compare(
            "the filter of the views",
            policy.interpolation,
            wanted.interpolation,
            "write a cache with --interpolation to have it",
        )
    return departures


def departures_of(about: Mapping[str, Any], objective: str) -> list[str]:
    """Return the departures of a recipe; a student trained alone has no teacher or projectors."""
    texts: list[str] = about["departures"]
    if objective != "none":
        return texts
    return [text for text in texts if "teacher" not in text and "projectors" not in text]


def batch_norm_views(config: TrainConfig, processes: int, objective: str) -> int | None:
    """Return over how many views a published pair computes batch norm; ``None`` if it has none.

    These are the batch norms of the student if it has some (of all processes with ``sync_bn``),
    and otherwise those of the projectors.
    """
    if config.model.startswith(("resnet", "mobilenet")):
        return config.batch_size * (processes if config.sync_bn else 1)
    if objective == "none" or config.objective_config.norm != "batch":
        return None
    return config.batch_size


def describe_recipe(name: str) -> dict[str, Any]:
    """Describe a shipped recipe: its ``_about``, batch, rate, and gain over training alone."""
    about = recipe_about(name)
    config = train_config(name, {"output": ""})
    top1, alone = about["top1"], about["top1_alone"]
    return {
        "name": name,
        **about,
        "teacher_model": resolve_model_name(about["teacher"])[0],
        "gain": None if top1 is None or alone is None else round(top1 - alone, 2),
        "batch": config.batch_size * config.grad_accum_steps * about["processes"],
        "opt": config.opt,
        "lr": config.lr,
    }


def _nested(
    base: Mapping[str, Any], changes: Iterable[tuple[str, Any]], teachers: Iterable[str]
) -> dict[str, Any]:
    """Add changes by dotted names to nested settings; a name of ``teachers`` may have dots."""
    result, by_length = dict(base), sorted(filter(None, teachers), key=len, reverse=True)
    for dotted, value in changes:
        mapping = result
        owner = next((name for name in by_length if dotted.startswith(f"{name}.")), None)
        parts = dotted.split(".")
        if owner is not None:
            parts = [owner, *dotted.removeprefix(f"{owner}.").split(".")]
        for parent in parts[:-1]:
            inner = mapping.get(parent, {})
            mapping[parent] = dict(inner) if isinstance(inner, Mapping) else {}
            mapping = mapping[parent]
        mapping[parts[-1]] = value
    return result
