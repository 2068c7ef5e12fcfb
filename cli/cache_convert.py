"""``scalekd cache convert``."""

from typing import Any

import click

from scalekd.cli._image_options import image_options
from scalekd.cli._options import NumberRange, checked, json_option, size
from scalekd.cli._output import emit


@click.command("convert")
@click.argument("source")
@click.argument("output")
@click.option(
    "--format",
    required=True,
    type=click.Choice(["zarr", "webdataset"]),
    help="Form of the new cache: arrays beside the image set, or tars that stream by themselves.",
)
@click.option(
    "--embed",
    default="none",
    show_default=True,
    type=click.Choice(["none", "source", "view"]),
    help="Images in the tars: none, the encoded files, or the rendered views.",
)
@click.option("--data-dir", help="The images the cache was made from, which --embed needs.")
@click.option("--split", default="train", show_default=True, help="Name, folder or pattern.")
@click.option("-j", "--workers", default=2, show_default=True, help="Processes that read images.")
@click.option("--shards", type=NumberRange(), help="Do these shards only.")
@image_options()
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Write a cache in its other form: Zarr arrays, or WebDataset tars.

    Every stored value is kept; the same command finishes a conversion that was interrupted.
    """
    from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache

    result = convert_cache(checked(ConvertConfig, **options))
    state = "complete" if result.complete else "not complete: other shards are still to be done"
    if result.shards_elsewhere:
        state = f"not complete: another process is writing {result.shards_elsewhere[0]}"
    lines = [
        f"{result.output}: {state}; {result.num_passes} passes, {result.num_shards} shards"
        f" ({result.shards_written} written now) in {result.seconds:,.1f} s"
    ]
    if result.total_bytes is not None and result.bytes_per_view is not None:
        lines.append(f"{size(result.total_bytes)}, {size(result.bytes_per_view)} a view")
    if result.extensions:
        lines.append(f"extensions brought along as they are: {', '.join(result.extensions)}")
    emit(result.model_dump(mode="json"), lines, as_json=as_json)
