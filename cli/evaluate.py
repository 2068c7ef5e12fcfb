"""``scalekd evaluate``."""

from typing import Any

import click

from scalekd.cli._image_options import image_options, taken_options
from scalekd.cli._options import json_option
from scalekd.cli._output import emit
from scalekd.cli._record import SynonymChoice


@click.command("evaluate")
@click.argument("model")
@click.option("--data-dir", required=True, help="Folder or pattern of the images.")
@click.option("--split", default="val", show_default=True, help="Name, folder or pattern.")
@click.option("--use-ema", is_flag=True, help="Take the run's averaged weights.")
@click.option("--checkpoint", help="Weights on disk, for a model by name.")
@click.option("--pretrained/--no-pretrained", default=True, help="Published weights, or random.")
@click.option("--img-size", type=click.IntRange(1), help="Image size, when not the model's own.")
@click.option(
    "--crop-pct", type=click.FloatRange(0, 1, min_open=True), help="Share the centre crop keeps."
)
@click.option(
    "--interpolation",
    type=click.Choice(["bicubic", "bilinear", "bilinear-opencv"]),
    help="Filter that resizes the images.  [default: the model's own]",
)
@click.option(
    "--class-map",
    default="auto",
    show_default=True,
    help="The model's class of each label, for subsets of its classes: auto, by name where both "
    "have names; none, by number; or a file, one number or name a line.",
)
@click.option("--teacher", help="Also run this teacher, and measure the agreement with it.")
@click.option("--teacher-checkpoint", help="The teacher's weights on disk.")
@click.option(
    "--teacher-pretrained/--no-teacher-pretrained",
    default=True,
    help="Read the teacher's published weights, or leave them random.",
)
@click.option("--teacher-cache", help="Read the teacher's answers from a cache of this split.")
@click.option("--knn-split", help="Also classify by nearest neighbours from this split.")
@click.option(
    "--knn-k",
    default=20,
    show_default=True,
    type=click.IntRange(1),
    help="Number of nearest neighbours that vote.",
)
@click.option(
    "--knn-temperature",
    default=0.07,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="A neighbour's vote weighs exp(cosine / temperature).",
)
@click.option(
    "-b",
    "--batch-size",
    default=128,
    show_default=True,
    type=click.IntRange(1),
    help="Number of images in a batch of each process.",
)
@click.option(
    "-j",
    "--workers",
    type=click.IntRange(0),
    help="Number of processes that decode images; 4, or as many as there are cores, if not given.",
)
@click.option(
    "--amp",
    "--precision",
    "amp",
    default="no",
    show_default=True,
    type=SynonymChoice(["auto", "bf16", "fp16", "no"]),
    help="Precision of autocast: auto is bf16 where the device has it; no, or fp32, for none.",
)
@image_options()
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Top-1 and top-5 of MODEL: a training run, a checkpoint in it, or any timm model."""
    import os

    from scalekd.pipelines.evaluate import EvaluateConfig, evaluate

    if options["workers"] is None:
        del options["workers"]
    found = evaluate(EvaluateConfig(image_options=taken_options(options), **options))
    if int(os.environ.get("RANK", "0")) != 0:
        return
    subset = found["num_classes_evaluated"]
    viewed = found["samples_viewed"]
    lines = [
        f"{found['model']} on {found['data']}: top-1 {found['top1']:.2f} %, "
        f"top-5 {found['top5']:.2f} %, loss {found['loss']:.4f}, {found['num_samples']:,} images"
        + (f" of {subset} of its classes" if subset is not None else "")
        + (f", after {viewed:,} views" if viewed is not None else "")
    ]
    if "teacher_agreement" in found:
        lines.append(
            f"agrees with the teacher on {found['teacher_agreement']:.2f} %; "
            f"the teacher's top-1 is {found['teacher_top1']:.2f} %"
        )
    if "knn_top1" in found:
        lines.append(
            f"{found['knn_k']} nearest of {found['knn_num_gallery']:,} images: "
            f"top-1 {found['knn_top1']:.2f} %, top-5 {found['knn_top5']:.2f} %"
        )
    emit(found, lines, as_json=as_json)
