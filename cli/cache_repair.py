"""``scalekd cache repair``."""

from typing import Any

import click

from scalekd.cli._image_options import image_options
from scalekd.cli._options import KeyValue, checked, json_option
from scalekd.cli._output import emit
from scalekd.errors import CacheCorrupt


@click.command("repair")
@click.argument("cache")
@click.option("--data-dir", help="Folder, URL or pattern of the images the cache was made from.")
@click.option("--split", default="train", show_default=True, help="Name, folder or pattern.")
@click.option("--model", help="The teacher's name here, when the cache's does not resolve.")
@click.option("--checkpoint", help="The teacher's weights, when they were read from a file.")
@click.option(
    "--model-kwargs", multiple=True, type=KeyValue(), help="Argument of the model; repeat."
)
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
@click.option("--remove-extra", is_flag=True, help="Delete files that nothing accounts for.")
@image_options()
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Make damaged and missing files again, to the bytes that were committed."""
    from scalekd.pipelines.repair_cache import RepairConfig, repair_cache

    options["model_kwargs"] = dict(options["model_kwargs"])
    given = {name: value for name, value in options.items() if value is not None}
    config = checked(RepairConfig, **given)
    result = repair_cache(config)
    lines = [f"mended: {path}" for path in result.mended]
    lines += [f"removed: {path}" for path in result.removed]
    lines += [f"still wrong: {problem}" for problem in result.problems]
    lines.append(
        f"{result.path}: {len(result.mended)} files mended, {len(result.shards_redone)} shards"
        f" drawn again, {len(result.removed)} unexpected files removed, in {result.seconds:,.1f} s"
    )
    emit(result.model_dump(mode="json"), lines, as_json=as_json)
    if not result.sound:
        raise CacheCorrupt(
            f"{result.path}: {result.problems[0]}; pass --remove-extra to delete what does not"
            " belong to the cache"
        )
