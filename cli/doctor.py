"""``scalekd doctor``."""

from typing import Any

import click

from scalekd.cli._image_options import image_options, taken_options
from scalekd.cli._options import json_option
from scalekd.cli._output import emit
from scalekd.errors import CacheMismatch


@click.command("doctor")
@click.option("--cache", help="A cache to look at.")
@click.option("--data-dir", help="An image set to check; with --cache, the one it was made from.")
@click.option("--split", default="train", show_default=True, help="Name, folder or pattern.")
@click.option(
    "--views",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Number of views to draw again.",
)
@image_options()
@json_option
def command(
    *,
    cache: str | None,
    data_dir: str | None,
    split: str,
    views: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what works here, what an image set holds, and whether a cache's views come out exactly.

    Exit code 4 when it does not.
    """
    from scalekd.pipelines.doctor import diagnose

    found = diagnose(
        cache,
        data_dir=data_dir,
        split=split,
        image_options=taken_options(options),
        num_views=views,
    )
    lines = []
    for title, facts in (
        ("versions", found.versions),
        ("machine", found.machine),
        ("works", found.works),
    ):
        lines.append(title)
        lines += [f"  {name:<26}{fact}" for name, fact in facts.items()]
    if found.images is not None:
        lines.append(f"images {found.images.place}")
        lines += [f"  {line}" for line in found.images.lines()]
    drift = found.cache
    if drift is not None:
        lines.append(f"cache {drift.path}")
        for what, differing in (
            ("decides pixels", drift.environment_differs),
            ("decides targets", drift.software_differs),
        ):
            lines += [
                f"  {name}: {there} in the cache, {here} here ({what})"
                for name, (there, here) in differing.items()
            ]
        if not drift.environment_differs:
            lines.append("  every version that decides pixels is the cache's")
        if drift.num_views:
            lines.append(
                f"  {drift.num_exact} of {drift.num_views} views came out to the pixel; mean"
                f" difference of {drift.num_witnesses} witnesses at most"
                f" {drift.witness_drift or 0:.3g}/255"
            )
            lines += [f"  {problem}" for problem in drift.problems[:5]]
        else:
            lines.append("  no view was drawn again: pass --data-dir to know for certain")
    emit(found.model_dump(mode="json"), lines, as_json=as_json)
    if drift is not None and drift.drifts:
        raise CacheMismatch(
            f"{drift.path}: this machine does not redraw it exactly (mean difference up to"
            f" {drift.witness_drift or 0:.3g}/255). Install the versions of the cache, or train"
            " with --allow-pixel-drift X"
        )
