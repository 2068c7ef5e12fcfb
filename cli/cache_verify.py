"""``scalekd cache verify``."""

from typing import Any

import click

from scalekd.cli._image_options import image_options
from scalekd.cli._options import KeyValue, checked, json_option, size
from scalekd.cli._output import emit
from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError


@click.command("verify")
@click.argument("cache")
@click.option("--quick", is_flag=True, help="Records and sizes only, without reading the data.")
@click.option(
    "--deep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Then draw N views again, and ask the teacher again.",
)
@click.option("--data-dir", help="The images the cache was made from, which --deep needs.")
@click.option(
    "--split", default="train", show_default=True, help="Name, folder or pattern of these images."
)
@click.option(
    "--model", help="The teacher's name here for --deep, when the cache's does not resolve."
)
@click.option(
    "--checkpoint", help="The teacher's weights for --deep, when they were read from a file."
)
@click.option(
    "--model-kwargs",
    multiple=True,
    type=KeyValue(),
    help="Argument of the teacher as key=value for --deep; repeat the option for more.",
)
@image_options()
@json_option
def command(cache: str, *, quick: bool, deep: int | None, as_json: bool, **options: Any) -> None:
    """Check every file of a cache against what was committed; exit code 4 names the damage."""
    from scalekd.pipelines.inspect_cache import verify_cache

    job = None
    if deep is not None:
        from scalekd.pipelines._source_options import CacheSources
        from scalekd.pipelines.check_replay import check_images_named, deep_verify

        if quick:
            raise UsageError("--deep draws views again: leave out --quick")
        options["model_kwargs"] = dict(options["model_kwargs"])
        job = checked(CacheSources, cache=cache, **options)
        check_images_named(job)
    elif options["data_dir"] is not None:
        raise UsageError("--data-dir: images are looked at with --deep alone; add it")
    found = verify_cache(cache, quick=quick)
    result = found.model_dump(mode="json")
    lines = [f"damaged: {problem}" for problem in found.problems]
    lines.append(
        f"{cache}: {found.num_files:,} files, {size(found.num_bytes)} checked,"
        f" {len(found.problems)} damaged"
    )
    untrue: tuple[str, ...] = ()
    if deep is not None and job is not None and not found.problems:
        again = deep_verify(job, deep)
        untrue, result["deep"] = again.problems, again.model_dump(mode="json")
        lines += [f"untrue: {problem}" for problem in again.problems]
        errors = ", ".join(f"{name} {error:.2g}" for name, error in again.largest_error.items())
        lines.append(
            f"{again.num_views:,} views drawn and the teacher asked again: {len(untrue)} untrue;"
            f" largest relative squared error: {errors or 'none'}"
        )
    emit(result, lines, as_json=as_json)
    if found.problems:
        raise CacheCorrupt(f"{cache}: {len(found.problems)} problems, first: {found.problems[0]}")
    if untrue:
        raise CacheMismatch(f"{cache}: {len(untrue)} views are untrue, first: {untrue[0]}")
