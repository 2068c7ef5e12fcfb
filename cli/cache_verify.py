"""``scalekd cache verify``."""

from pathlib import Path

import click

from scalekd.cli._options import emit, json_option, size
from scalekd.errors import CacheCorrupt


@click.command("verify")
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Records and sizes only, without reading the data.")
@json_option
def command(cache: Path, *, quick: bool, as_json: bool) -> None:
    """Check every file of a cache against what was committed; exit code 4 names the damage."""
    from scalekd.pipelines.inspect_cache import verify_cache

    found = verify_cache(cache, quick=quick)
    lines = [f"damaged: {problem}" for problem in found.problems]
    lines.append(
        f"{cache}: {found.num_files:,} files, {size(found.num_bytes)} checked,"
        f" {len(found.problems)} damaged"
    )
    emit(found.model_dump(mode="json"), lines, as_json=as_json)
    if found.problems:
        raise CacheCorrupt(f"{cache}: {len(found.problems)} problems, first: {found.problems[0]}")
