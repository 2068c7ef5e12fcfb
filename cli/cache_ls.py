"""``scalekd cache ls``."""

import click

from scalekd.cli._options import json_option, size
from scalekd.cli._output import emit, table


@click.command("ls")
@click.argument("root")
@click.option(
    "--depth",
    default=4,
    show_default=True,
    type=click.IntRange(0, 64),
    help="Number of folder levels below ROOT to search.",
)
@json_option
def command(root: str, *, depth: int, as_json: bool) -> None:
    """List the caches below a folder or in a bucket, with their contents and state.

    Reads manifests and plans only; `scalekd cache verify` checks the data.
    """
    from scalekd.pipelines.list_caches import COLUMNS, list_caches

    caches = list_caches(root, max_depth=depth)
    rows = [COLUMNS, *(cache.cells(size) for cache in caches)]
    lines = []
    for line, cache in zip(table(rows), (None, *caches), strict=True):
        lines.append(line)
        for name in ("problem", "part", "note"):
            if cache is not None and (text := getattr(cache, name)):
                lines.append(f"  {name}: {text}")
    emit(
        {"caches": [cache.model_dump(mode="json") for cache in caches]},
        lines if caches else [f"no cache below {root}"],
        as_json=as_json,
    )
