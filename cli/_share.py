"""What ``scalekd cache push`` and ``scalekd cache pull`` share: one command, two directions."""

from typing import Any

import click

from scalekd.cli._options import NumberRange, Stages, checked, json_option, size
from scalekd.cli._output import emit


def share_command(name: str, doc: str) -> click.Command:
    """The command of that name; ``doc`` is its help."""

    @click.command(name, help=doc)
    @click.argument("source")
    @click.argument("target")
    @click.option("--passes", type=NumberRange(), help="Take these passes only.")
    @click.option("--shards", type=NumberRange(), help="Take these shards only.")
    @click.option("--stages", type=Stages(), help="Take these stages only: 3,4, final or none.")
    @click.option(
        "--logits-only", is_flag=True, help="Take logits and views, no features, no tail."
    )
    @click.option(
        "--jobs",
        default=8,
        show_default=True,
        type=click.IntRange(1, 64),
        help="Number of files that travel at once.",
    )
    @click.option("--check", is_flag=True, help="Read what stands there; replace what differs.")
    @click.option(
        "--read-back/--no-read-back",
        default=True,
        show_default=True,
        help="Read each file back from a remote target, and check it.",
    )
    @json_option
    def command(*, as_json: bool, **options: Any) -> None:
        from scalekd.pipelines.share_cache import ShareConfig, share_cache

        result = share_cache(checked(ShareConfig, **options))
        state = f"a part, {result.part}" if result.part else "all of it"
        if not result.complete:
            state = (
                "not complete, as the source is not: run the same command again when it has more"
            )
        lines = [
            f"{result.target}: {state}",
            f"{result.num_files:,} files, {size(result.num_bytes)} in {result.seconds:,.1f} s,"
            f" {size(result.num_bytes / max(result.seconds, 1e-9))}/s;"
            f" {result.num_found:,} of {result.num_shards:,} shards stood already",
        ]
        if result.extensions:
            lines.append(f"with extensions {', '.join(result.extensions)}")
        emit(result.model_dump(mode="json"), lines, as_json=as_json)

    return command
