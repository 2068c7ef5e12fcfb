"""``scalekd cache extend``."""

from pathlib import Path
from typing import Any

import click

from scalekd.cli._cache_teacher_lines import result_lines
from scalekd.cli._image_options import image_options
from scalekd.cli._options import KeyValue, NumberRange, Stages, checked, json_option
from scalekd.cli._output import emit


@click.command("extend")
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--data-dir",
    required=True,
    help="Folder, URL or pattern of the images the cache was made from.",
)
@click.option("--split", default="train", show_default=True, help="Name, folder or pattern.")
@click.option("--passes", type=click.IntRange(1, 9999), help="Passes to have in the end.")
@click.option("--name", help="Add targets under this name, in extensions/NAME/.")
@click.option(
    "--stages", type=Stages(), help="Stages whose features --name keeps: 3,4, final or none."
)
@click.option("--logits", help="Logits that --name keeps: full, topk:K or none.")
@click.option("--codec", help="Codec of the features that --name keeps.")
@click.option("--model", help="Another teacher, with --name; or the teacher's name here.")
@click.option("--checkpoint", help="The teacher's weights, when they are read from a file.")
@click.option(
    "--model-kwargs", multiple=True, type=KeyValue(), help="Argument of the model; repeat."
)
@click.option(
    "--teacher-classes",
    type=click.Path(path_type=Path),
    help="File with the names of another teacher's classes, one a line.",
)
@click.option(
    "--class-map",
    help="Another teacher's class of each label: auto, by name; none, by number; or a "
    "file, one number or name a line.  [default: auto]",
)
@click.option(
    "--pretrained/--no-pretrained",
    default=True,
    help="Read another teacher's published weights, or leave them random.",
)
@click.option("--licence", help="Licence of another teacher's weights.")
@click.option("--note", help="Text to keep in the manifest of --name.")
@click.option("--shards", type=NumberRange(), help="Do these shards only.")
@click.option("--local-cache", help="Folder for copies of remote image shards.  [default: none]")
@click.option(
    "--local-cache-size",
    default="100GB",
    show_default=True,
    help="Largest size of --local-cache; copies that were used longest ago are deleted.",
)
@click.option(
    "-j",
    "--workers",
    type=click.IntRange(0),
    help="Processes that draw views.  [default: by the cores of a process on a GPU, else 2]",
)
@image_options()
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Add passes to a cache; or, with --name, stages or another teacher's targets.

    Options that are left out are taken from the cache, and existing files are not changed. The same
    command continues after an interruption.
    """
    from scalekd.pipelines.extend_cache import ExtendConfig, extend_cache

    options["model_kwargs"] = dict(options["model_kwargs"])
    given = {name: value for name, value in options.items() if value is not None}
    result = extend_cache(checked(ExtendConfig, **given))
    if result.is_main_process:
        emit(result.model_dump(mode="json"), result_lines(result), as_json=as_json)
