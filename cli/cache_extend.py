"""``scalekd cache extend``."""

from typing import Any

import click

from scalekd.cli._cache_teacher_lines import result_lines
from scalekd.cli._options import checked, json_option
from scalekd.cli._output import emit
from scalekd.cli._paths import check_cache_folder, check_data_dir
from scalekd.cli._record import GroupedCommand, given, record_options
from scalekd.pipelines._source_options import ExtendConfig


@click.command("extend", cls=GroupedCommand)
@click.argument("cache")
@record_options(ExtendConfig, leave_out=("cache",), required=True)
@json_option
def command(*, as_json: bool, **options: Any) -> None:
    """Add passes to a cache; or, with --name, stages or another teacher's targets.

    Options that are left out are taken from the cache, and existing files are not changed. The same
    command continues after an interruption.
    """
    check_cache_folder(options["cache"])
    check_data_dir(options["data_dir"])

    from scalekd.pipelines.extend_cache import extend_cache

    result = extend_cache(checked(ExtendConfig, **given(options)))
    if result.is_main_process:
        emit(result.model_dump(mode="json"), result_lines(result), as_json=as_json)
