"""``scalekd train-student``."""

from typing import Any

import click

from scalekd.cli._output import print_result
from scalekd.cli._paths import check_paths
from scalekd.cli._record import GroupedCommand, given, json_option, record_options
from scalekd.training.config import TrainConfig


@click.command("train-student", cls=GroupedCommand)
@record_options(TrainConfig, flag_values={"torchcompile": "inductor"})
@json_option
def train_student(*, recipe: str | None, as_json: bool, **options: Any) -> None:
    """Train a student from a teacher's cache.

    Stops cleanly on Ctrl-C and SIGTERM; the same command with --resume auto continues.
    """
    flags = given(options)
    check_paths(
        cache=flags.get("cache"),
        data_dir=flags.get("data_dir"),
    )

    from scalekd.pipelines.configure import train_config
    from scalekd.pipelines.train_student import train_student

    print_result(train_student(train_config(recipe, flags)), as_json=as_json)
