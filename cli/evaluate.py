"""``scalekd evaluate``."""

from pathlib import Path
from typing import Any

import click

from scalekd.cli._options import emit, json_option


@click.command("evaluate")
@click.argument("model")
@click.option("--data-dir", required=True, help="Folder or pattern of the images.")
@click.option("--split", default="val", show_default=True, help="Name, folder or pattern.")
@click.option("--use-ema", is_flag=True, help="Take the run's averaged weights.")
@click.option("--checkpoint", help="Weights on disk, for a model by name.")
@click.option("--img-size", type=click.IntRange(1), help="Image size, when not the model's own.")
@click.option(
    "--crop-pct", type=click.FloatRange(0, 1, min_open=True), help="Share the centre crop keeps."
)
@click.option(
    "--class-map",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The model's class of each label, one a line, for subsets of its classes.",
)
@click.option("-b", "--batch-size", default=128, show_default=True, type=click.IntRange(1))
@click.option("-j", "--workers", default=4, show_default=True, type=click.IntRange(0))
@click.option(
    "--amp", default="no", show_default=True, type=click.Choice(["auto", "bf16", "fp16", "no"])
)
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Top-1 and top-5 of MODEL: a training run, a checkpoint in it, or any timm model."""
    import os

    from scalekd.pipelines.evaluate import EvaluateConfig, evaluate

    found = evaluate(EvaluateConfig(**options))
    if int(os.environ.get("RANK", "0")) != 0:
        return
    lines = [
        f"{found['model']} on {found['data']}: top-1 {found['top1']:.2f} %, "
        f"top-5 {found['top5']:.2f} %, loss {found['loss']:.4f}, {found['num_samples']:,} images"
    ]
    emit(found, lines, as_json=as_json)
