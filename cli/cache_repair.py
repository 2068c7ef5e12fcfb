"""``scalekd cache repair``."""

from typing import Any

import click

from scalekd.cli._options import checked, json_option
from scalekd.cli._output import emit
from scalekd.cli._paths import check_cache_folder
from scalekd.cli._record import GroupedCommand, given, record_options
from scalekd.errors import CacheCorrupt
from scalekd.pipelines._source_options import RepairConfig


@click.command("repair", cls=GroupedCommand)
@click.argument("cache")
@record_options(RepairConfig, leave_out=("cache",))
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Make damaged and missing files again, to the bytes that were committed."""
    check_cache_folder(options["cache"])

    from scalekd.pipelines.repair_cache import repair_cache

    result = repair_cache(checked(RepairConfig, **given(options)))
    lines = [f"mended: {path}" for path in result.mended]
    lines += [f"removed: {path}" for path in result.removed]
    lines += [f"still wrong: {problem}" for problem in result.problems]
    lines.append(
        f"{result.path}: {len(result.mended)} files mended, {len(result.shards_redone)} shards"
        f" drawn again, {len(result.removed)} unexpected files removed, in {result.seconds:,.1f} s"
    )
    failure = None
    if not result.sound:
        failure = CacheCorrupt(
            f"{result.path}: {result.problems[0]}; pass --remove-extra to delete what does not"
            " belong to the cache"
        )
    emit(result.model_dump(mode="json"), lines, as_json=as_json, failure=failure)
