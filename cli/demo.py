"""``scalekd demo``."""

from pathlib import Path

import click

from scalekd.cli._options import json_option
from scalekd.cli._output import echo, emit
from scalekd.errors import UsageError


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("output/demo"),
    show_default=True,
    help="New folder for all files of the demo.",
)
@click.option("--overwrite", is_flag=True, help="Delete the files of an earlier demo in --output.")
@json_option
def command(output: Path, *, overwrite: bool, as_json: bool) -> None:
    """Train a teacher, write its cache and train nine students on scikit-learn's digits.

    Takes a few minutes on a CPU.
    """
    import shutil

    from scalekd.pipelines.demo import run_demo

    if output.exists() and any(output.iterdir()):
        if not overwrite or not (output / "data").is_dir():
            raise UsageError(
                f"{output} is not empty; choose another --output, or --overwrite a demo"
            )
        shutil.rmtree(output)
    result = run_demo(output, say=lambda line: echo(f"· {line}", err=True))
    emit(result.model_dump(mode="json"), result.lines(), as_json=as_json)
