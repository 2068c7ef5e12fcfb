"""``scalekd cache convert``."""

from typing import Any

import click

from scalekd.cli._options import checked, json_option, sizes
from scalekd.cli._output import emit
from scalekd.cli._record import GroupedCommand, given, record_options
from scalekd.pipelines._cache_options import ConvertConfig


@click.command("convert", cls=GroupedCommand)
@click.argument("source")
@click.argument("output")
@record_options(ConvertConfig, leave_out=("source", "output"), required=True)
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Write a cache in its other form: Zarr arrays, or WebDataset tars.

    Every stored value is kept; the same command finishes an interrupted conversion.
    """
    from scalekd.pipelines.convert_cache import convert_cache

    result = convert_cache(checked(ConvertConfig, **given(options)))
    state = "complete" if result.complete else "not complete: other shards are still to be done"
    if result.shards_elsewhere:
        state = f"not complete: another process is writing {result.shards_elsewhere[0]}"
    lines = [
        f"{result.output}: {state}; {result.num_passes} passes, {result.num_shards} shards"
        f" ({result.shards_written} written now) in {result.seconds:,.1f} s"
    ]
    if result.total_bytes is not None:
        lines.append(sizes(result.total_bytes, result.fixed_bytes or 0, result.bytes_per_view or 0))
    if result.extensions:
        lines.append(f"extensions copied unchanged: {', '.join(result.extensions)}")
    emit(result.model_dump(mode="json"), lines, as_json=as_json)
