"""``scalekd cache info``."""

import click

from scalekd.cli._options import json_option, size
from scalekd.cli._output import emit


@click.command("info")
@click.argument("cache")
@json_option
def command(cache: str, *, as_json: bool) -> None:
    """Describe a cache: teacher, views, stages, codecs and their errors, size."""
    from scalekd.pipelines.inspect_cache import cache_info

    info = cache_info(cache)
    rows = list(info.rows(size))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    emit(info.model_dump(mode="json"), lines, as_json=as_json)
