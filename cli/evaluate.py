"""``scalekd evaluate``."""

import os
import statistics
from typing import Any

import click

from scalekd.cli._options import checked, json_option
from scalekd.cli._output import emit
from scalekd.cli._paths import check_data_dir
from scalekd.cli._record import GroupedCommand, given, record_options
from scalekd.pipelines._evaluate_options import EvaluateConfig


@click.command("evaluate", cls=GroupedCommand)
@click.argument("model")
@record_options(EvaluateConfig, leave_out=("model",), required=True)
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Top-1 and top-5 of MODEL: a training run, a checkpoint in it, or any timm model.

    A model without classes is evaluated by its features: --knn-split, --linear-probe.
    """
    config = checked(EvaluateConfig, **given(options))
    check_data_dir(config.data_dir)

    from scalekd.pipelines.evaluate import evaluate

    found = evaluate(config)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    subset = found["num_classes_evaluated"]
    viewed = found["samples_viewed"]
    scores = (
        f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f}, "
        if "top1" in found
        else "no classes of its own, "
    )
    lines = [
        f"{found['model']} on {found['data']}: {scores}{found['num_samples']:,} images"
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
    if "linear_top1" in found:
        tops = found["linear_top1_of_seeds"]
        spread = f" ± {statistics.stdev(tops):.2f} ({len(tops)} seeds)" if len(tops) > 1 else ""
        lines.append(
            f"logistic regression on the features of {found['linear_num_images']:,} images: "
            f"top-1 {found['linear_top1']:.2f} %{spread}, top-5 {found['linear_top5']:.2f} %"
        )
    emit(found, lines, as_json=as_json)
