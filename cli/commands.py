"""Commands beside the two stages; each imports its pipeline, and thus torch, when called."""

import shutil

from scalekd.cli._output import Result, echo
from scalekd.cli._paths import check_data_dir, check_paths
from scalekd.cli._record import record_command
from scalekd.errors import UsageError
from scalekd.options import Options
from scalekd.pipelines._run_options import (
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    RecipesConfig,
    ReportConfig,
)
from scalekd.pipelines._source_options import DoctorConfig


@record_command("evaluate", EvaluateConfig, arguments=("model",))
def evaluate(config: EvaluateConfig) -> Result:
    """Measure top-1 and top-5 of MODEL: a training run, a checkpoint in it, or any timm model.

    A model without a classifier is measured by its features, with --knn-split or --linear-probe.
    """
    check_data_dir(config.data_dir, config.split)

    from scalekd.pipelines.evaluate import evaluate

    return evaluate(config)


@record_command("export", ExportConfig, arguments=("run",))
def export(config: ExportConfig) -> Result:
    """Write the best student of the training run RUN, or of a checkpoint folder inside it.

    The written model is opened again and its outputs are compared with the student's: they must be
    identical, or for ONNX within 1e-4 of the largest value.
    """
    from scalekd.pipelines.export import export

    return export(
        config.run,
        config.output,
        export_format=config.format,
        use_ema=config.use_ema,
        img_size=config.img_size,
        features=config.features,
    )


@record_command("report", ReportConfig, arguments=("runs",))
def report(config: ReportConfig) -> Result:
    """Compare training RUNS, or all runs in folders, on one page with their curves.

    Runs that differ only in their seed form one row.
    """
    from scalekd.pipelines.report import report

    return report(config.runs, config.output, cache_page=config.cache_page)


@record_command("demo", DemoConfig)
def demo(config: DemoConfig) -> Result:
    """Train a teacher, write its cache and train nine students on scikit-learn's digits.

    Takes about a minute and a half on two cores, and leaves at most 50 MB in --output.
    """
    output = config.output
    if output.exists() and any(output.iterdir()):
        if not config.overwrite or not (output / "data").is_dir():
            raise UsageError(
                f"{output} is not empty; choose another --output, or pass --overwrite to replace a"
                " demo"
            )
        shutil.rmtree(output)
    echo("· loading PyTorch", err=True)
    from scalekd.pipelines.demo import default_processes, run_demo

    return run_demo(
        output, processes=default_processes(), say=lambda line: echo(f"· {line}", err=True)
    )


@record_command("recipes", RecipesConfig, arguments=("name",))
def recipes(config: RecipesConfig) -> Result:
    """List the published pairs, or show the commands and the cost of the recipe NAME."""
    from scalekd.errors import rewording
    from scalekd.pipelines.recipe_plan import list_or_plan_recipes

    with rewording({"--recipe ": ""}):
        return list_or_plan_recipes(config)


@record_command("doctor", DoctorConfig)
def doctor(config: DoctorConfig) -> Result:
    """Check this machine, an image set, and whether a cache's views are redrawn exactly.

    The exit code is 3 if images cannot be decoded, and 4 if views of the cache differ.
    """
    check_paths(
        cache=config.cache,
        data_dir=config.data_dir,
        split=config.split,
        labels=config.labels,
    )

    from scalekd.pipelines.doctor import diagnose

    return diagnose(
        config.cache,
        data_dir=config.data_dir,
        split=config.split,
        image_options=config.image_options,
        num_views=config.views,
        num_images=config.images,
    )


@record_command("models", Options)
def models(config: Options) -> Result:
    """List the short names of teachers and students, and the targets of each model family."""
    from scalekd.pipelines.list_models import list_models

    del config
    return list_models()
