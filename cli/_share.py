"""The command behind ``scalekd cache push`` and ``scalekd cache pull``."""

from typing import Any

import click

from scalekd.cli._options import checked, json_option, size
from scalekd.cli._output import emit
from scalekd.cli._record import GroupedCommand, given, record_options
from scalekd.pipelines._cache_options import ShareConfig


def share_command(name: str, doc: str) -> click.Command:
    """Make the command ``name``; ``doc`` is its help."""

    @click.command(name, cls=GroupedCommand, help=doc)
    @click.argument("source")
    @click.argument("target")
    @record_options(ShareConfig, leave_out=("source", "target"))
    @json_option
    def command(*, as_json: bool, **options: Any) -> None:
        from scalekd.pipelines.share_cache import share_cache

        result = share_cache(checked(ShareConfig, **given(options)))
        state = f"a part: {result.part}" if result.part else "the whole cache"
        if not result.complete:
            state = "not complete, because the source is not: run the same command again later"
        lines = [
            f"{result.target}: {state}",
            f"{result.num_files:,} files, {size(result.num_bytes)} in {result.seconds:,.1f} s,"
            f" {size(result.num_bytes / max(result.seconds, 1e-9))}/s;"
            f" {result.num_found:,} of {result.num_shards:,} shards existed already",
        ]
        if result.extensions:
            lines.append(f"with extensions {', '.join(result.extensions)}")
        emit(result.model_dump(mode="json"), lines, as_json=as_json)

    return command
