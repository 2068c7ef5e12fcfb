"""``scalekd cache verify``."""

from typing import Any

import click

from scalekd.cli._options import checked, json_option, size
from scalekd.cli._output import emit
from scalekd.cli._paths import check_cache_folder
from scalekd.cli._record import GroupedCommand, given, record_options
from scalekd.errors import CacheCorrupt, CacheError, CacheMismatch, UsageError
from scalekd.pipelines._source_options import VerifyConfig


@click.command("verify", cls=GroupedCommand)
@click.argument("cache")
@record_options(VerifyConfig, leave_out=("cache", "workers", "local_cache", "local_cache_size"))
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Check the digest of every file of a cache; the exit code is 4 for a damaged cache."""
    check_cache_folder(options["cache"])

    from scalekd.pipelines.inspect_cache import verify_cache

    config = checked(VerifyConfig, **given(options))
    cache, deep = config.cache, config.deep
    if deep is not None:
        from scalekd.pipelines.check_replay import check_images_named, deep_verify

        if config.quick:
            raise UsageError("--deep draws views again: leave out --quick")
        check_images_named(config)
    elif config.data_dir is not None:
        raise UsageError("--data-dir: images are only used with --deep; add --deep N")
    verified = verify_cache(cache, quick=config.quick)
    result = verified.model_dump(mode="json")
    lines = [f"damaged: {problem}" for problem in verified.problems]
    lines.append(
        f"{cache}: {verified.num_files:,} files, {size(verified.num_bytes)} checked,"
        f" {len(verified.problems)} damaged"
    )
    untrue: tuple[str, ...] = ()
    if deep is not None and not verified.problems:
        again = deep_verify(config, deep)
        untrue, result["deep"] = again.problems, again.model_dump(mode="json")
        lines += [f"untrue: {problem}" for problem in again.problems]
        errors = ", ".join(f"{name} {error:.2g}" for name, error in again.largest_error.items())
        lines.append(
            f"{again.num_views:,} views drawn and the teacher asked again: {len(untrue)} untrue;"
            f" largest relative squared error: {errors or 'none'}"
        )
    failure: CacheError | None = None
    if problems := verified.problems:
        failure = CacheCorrupt(f"{cache}: {len(problems)} problems, first: {problems[0]}")
    elif untrue:
        failure = CacheMismatch(f"{cache}: {len(untrue)} views are untrue, first: {untrue[0]}")
    emit(result, lines, as_json=as_json, failure=failure)
