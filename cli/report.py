"""``scalekd report``."""

from pathlib import Path

import click

from scalekd.cli._options import json_option
from scalekd.cli._output import emit


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="HTML file to write; an existing file is replaced.",
)
@json_option
def command(runs: tuple[Path, ...], output: Path, *, as_json: bool) -> None:
    """Compare training RUNS, or all runs in folders, on one page with their curves.

    Runs that differ only in their seed form one row.
    """
    from scalekd.pipelines.report import report

    result = report(runs, output)
    emit(result.model_dump(mode="json"), result.lines(), as_json=as_json)
