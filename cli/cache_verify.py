"""``scalekd cache verify``."""

from typing import Any

import click

from scalekd.cli._image_options import image_options
from scalekd.cli._options import KeyValue, checked, json_option, size
from scalekd.cli._output import emit
from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError


@click.command("verify")
@click.argument("cache")
@click.option(
    "--quick", is_flag=True, help="Check records and file sizes only, without reading the data."
)
@click.option(
    "--deep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also draw N views again, and run the teacher on them.",
)
@click.option(
    "--data-dir", help="Folder, URL or pattern of the images the cache was made from, for --deep."
)
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
    """Check the digest of every file of a cache; the exit code is 4 for a damaged cache."""
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
        raise UsageError("--data-dir: images are only used with --deep; add --deep N")
    verified = verify_cache(cache, quick=quick)
    result = verified.model_dump(mode="json")
    lines = [f"damaged: {problem}" for problem in verified.problems]
    lines.append(
        f"{cache}: {verified.num_files:,} files, {size(verified.num_bytes)} checked,"
        f" {len(verified.problems)} damaged"
    )
    untrue: tuple[str, ...] = ()
    if deep is not None and job is not None and not verified.problems:
        again = deep_verify(job, deep)
        untrue, result["deep"] = again.problems, again.model_dump(mode="json")
        lines += [f"untrue: {problem}" for problem in again.problems]
        errors = ", ".join(f"{name} {error:.2g}" for name, error in again.largest_error.items())
        lines.append(
            f"{again.num_views:,} views drawn and the teacher asked again: {len(untrue)} untrue;"
            f" largest relative squared error: {errors or 'none'}"
        )
    emit(result, lines, as_json=as_json)
    if verified.problems:
        problems = verified.problems
        raise CacheCorrupt(f"{cache}: {len(problems)} problems, first: {problems[0]}")
    if untrue:
        raise CacheMismatch(f"{cache}: {len(untrue)} views are untrue, first: {untrue[0]}")
