"""``scalekd train-student``."""

import os
from dataclasses import asdict
from typing import Any

import click

from scalekd.cli._options import json_option
from scalekd.cli._output import echo, emit
from scalekd.cli._paths import check_paths
from scalekd.cli._record import GroupedCommand, given, record_options
from scalekd.training.config import TrainConfig


@click.command("train-student", cls=GroupedCommand)
@record_options(TrainConfig, flag_values={"torchcompile": "inductor"})
@json_option
def command(*, recipe: str | None, as_json: bool, **options: Any) -> None:
    """Train a student from a teacher's cache.

    Stops cleanly on Ctrl-C and SIGTERM; the same command with --resume auto continues.
    """
    flags = given(options)
    check_paths(cache=flags.get("cache"), data_dir=flags.get("data_dir"))

    from scalekd.pipelines.configure import departures_from_recipe, train_config
    from scalekd.pipelines.train_student import train_student

    if flags.get("val_split") == "none":
        flags["val_split"] = None
    config = train_config(recipe, flags)
    is_main = int(os.environ.get("RANK", "0")) == 0
    if recipe is not None and is_main:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        for departure in departures_from_recipe(recipe, config, world_size=world_size):
            echo(f"note: {departure}", err=True)
    result = train_student(config)
    if not is_main:
        return
    metrics = result.metrics
    scores = [
        f"{label} {metrics[name]:.2f} %"
        for name, label in (("eval_top1", "top-1"), ("ema_eval_top1", "top-1 of the average"))
        if name in metrics
    ]
    lines = [
        f"{result.output}: {result.epochs} epochs, {result.samples_viewed:,} views, "
        f"loss {metrics['train_loss']:.4g}" + "".join(f", {score}" for score in scores),
        f"best: epoch {result.best_epoch + 1}, in {result.output}/model_best",
    ]
    emit(asdict(result), lines, as_json=as_json)
