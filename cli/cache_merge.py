"""``scalekd cache merge``."""

from pathlib import Path

import click

from scalekd.cli._options import json_option, size
from scalekd.cli._output import emit


@click.command("merge")
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder of the joined cache."
)
@click.option("--copy", is_flag=True, help="Copy every file instead of making hard links.")
@json_option
def command(parts: tuple[Path, ...], output: Path, *, copy: bool, as_json: bool) -> None:
    """Join parts of one cache that were written on different machines.

    Every file is checked before it is linked or copied. The same command continues after an
    interruption.
    """
    from scalekd.pipelines.merge_caches import merge_caches

    result = merge_caches(parts, output, copy=copy)
    lines = [f"missing: {shards}" for shards in result.missing]
    state = f"{result.num_passes} passes complete" if result.complete else "not complete"
    lines.append(
        f"{output}: {state}; {result.num_files:,} files, {size(result.num_bytes)} in"
        f" {result.seconds:,.1f} s; {result.num_found:,} shards existed already"
    )
    lines += [
        f"extension {name}: {inner.num_passes} passes complete"
        for name, inner in result.extensions.items()
    ]
    emit(result.model_dump(mode="json"), lines, as_json=as_json)
