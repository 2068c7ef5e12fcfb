"""``scalekd cache-teacher``."""

from pathlib import Path
from typing import Any

import click

from scalekd.cli._cache_teacher_lines import result_lines
from scalekd.cli._image_options import image_options
from scalekd.cli._options import KeyValue, NumberRange, Stages, checked, json_option
from scalekd.cli._output import echo, emit


@click.command("cache-teacher")
@click.option("--model", required=True, help="timm name, alias, hf-hub:… or local-dir:….")
@click.option("--checkpoint", help="Weights on disk (safetensors or a state dict).")
@click.option(
    "--model-kwargs", multiple=True, type=KeyValue(), help="Argument of the model; repeat."
)
@click.option("--pretrained/--no-pretrained", default=True, help="Read published weights.")
@click.option("--data-dir", required=True, help="Folder, URL or pattern of the images.")
@click.option("--split", default="train", show_default=True, help="Name, folder or pattern.")
@click.option("--output", required=True, help="Folder or URL of the cache.")
@click.option("--local-cache", help="Folder for copies of remote image shards.  [default: none]")
@click.option(
    "--local-cache-size",
    default="100GB",
    show_default=True,
    help="Largest size of --local-cache; copies that were used longest ago are deleted.",
)
@click.option("--passes", default=1, show_default=True, help="Views of every sample.")
@click.option("--img-size", type=int, help="Image size, when not the model's own.")
@click.option(
    "--stages", default="3,4", show_default=True, type=Stages(), help="3,4, final or none."
)
@click.option(
    "--logits",
    help="full, topk:K or none.  [default: full of a teacher with a classifier, else none]",
)
@click.option(
    "--teacher-classes",
    type=click.Path(path_type=Path),
    help="File with the names of the teacher's classes, one a line, in the order of its logits."
    "  [default: as its config.json or timm lists them]",
)
@click.option(
    "--class-map",
    default="auto",
    show_default=True,
    help="The teacher's class of each label: auto, by name; none, by number; or a file, one number "
    "or name a line.",
)
@click.option(
    "--codec",
    default=None,
    help="transform[:error=E], float16 or int8.  [default: transform:error=0.01]",
)
@click.option(
    "--aug",
    default="crop-flip",
    show_default=True,
    help="crop[:LO..HI] or center[:F], flip[:P], rand-…, jitter:S, erase:P, joined by +.",
)
@click.option(
    "--interpolation",
    default="bicubic",
    show_default=True,
    type=click.Choice(["bicubic", "bilinear", "bilinear-opencv"]),
    help="Resize filter of the views; bilinear-opencv is cv2.resize, without antialiasing.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the views.")
@click.option("--limit", type=int, help="Take the first N samples.")
@click.option("--shards", type=NumberRange(), help="Do these shards only.")
@click.option("--shard-size", type=int, help="Views a shard.  [default: by the number of samples]")
@click.option("-b", "--batch-size", default=64, show_default=True, help="Views a forward.")
@click.option(
    "-j",
    "--workers",
    type=click.IntRange(0),
    help="Processes that draw views.  [default: by the cores of a process on a GPU, else 2]",
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="The teacher's arithmetic; auto is bf16 on GPUs that have it, fp32 elsewhere.",
)
@click.option(
    "--torchcompile",
    is_flag=False,
    flag_value="inductor",
    help="Compile the teacher, with this backend of torch.compile.  [default backend: inductor]",
)
@click.option("--skip-corrupt", is_flag=True, help="Leave corrupt images out, and count them.")
@click.option(
    "--format",
    default="zarr",
    show_default=True,
    type=click.Choice(["zarr", "webdataset"]),
    help="Arrays beside the image set, or tars that stream by themselves.",
)
@click.option(
    "--embed",
    default="none",
    show_default=True,
    type=click.Choice(["none", "source", "view"]),
    help="Images in the tars: none, the encoded files, or the rendered views.",
)
@click.option("--overwrite", is_flag=True, help="Delete the cache at --output first.")
@click.option("--licence", help="Of the teacher's weights.  [default: as timm records it]")
@click.option("--note", help="Free text to keep in the manifest.")
@click.option("--dry-run", is_flag=True, help="Say what it would cost, from a short probe.")
@image_options()
@json_option
def command(*, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Run a teacher once over drawn views, and keep its features and logits.

    The same command finishes a cache that was interrupted.
    """
    from scalekd.models.classes import read_class_names
    from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
    from scalekd.pipelines.estimate import estimate_cache
    from scalekd.teachers import TeacherConfig, resolve_model_name

    teacher = checked(
        TeacherConfig,
        model=options.pop("model"),
        checkpoint=options.pop("checkpoint"),
        model_kwargs=dict(options.pop("model_kwargs")),
        pretrained=options.pop("pretrained"),
        img_size=options.pop("img_size"),
        class_names=read_class_names(options.pop("teacher_classes")),
    )
    given = {name: value for name, value in options.items() if value is not None}
    config = checked(CacheTeacherConfig, teacher=teacher, **given)
    _, expansion = resolve_model_name(config.teacher.model)
    if expansion:
        echo(expansion, err=True)
    if dry_run:
        estimate = estimate_cache(config)
        emit(estimate.model_dump(mode="json"), estimate.lines(), as_json=as_json)
        return
    result = cache_teacher(config)
    if not result.is_main_process:
        return
    emit(result.model_dump(mode="json"), result_lines(result), as_json=as_json)
