"""``scalekd doctor``."""

from typing import Any

import click

from scalekd.cli._image_options import image_options, taken_options
from scalekd.cli._options import json_option
from scalekd.cli._output import emit
from scalekd.errors import CacheMismatch


@click.command("doctor")
@click.option("--cache", help="Folder or URL of a cache to check.")
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
    """Check this machine, describe an image set, and compare a cache's views with redrawn ones.

    The exit code is 4 if views of the cache differ.
    """
    from scalekd.pipelines.doctor import diagnose

    diagnosis = diagnose(
        cache,
        data_dir=data_dir,
        split=split,
        image_options=taken_options(options),
        num_views=views,
    )
    lines = []
    for title, facts in (
        ("versions", diagnosis.versions),
        ("machine", diagnosis.machine),
        ("works", diagnosis.works),
    ):
        lines.append(title)
        lines += [f"  {name:<26}{fact}" for name, fact in facts.items()]
    if diagnosis.images is not None:
        lines.append(f"images {diagnosis.images.place}")
        lines += [f"  {line}" for line in diagnosis.images.lines()]
    drift = diagnosis.cache
    if drift is not None:
        lines.append(f"cache {drift.path}")
        for what, differing in (
            ("affects pixels", drift.environment_differs),
            ("affects targets", drift.software_differs),
        ):
            lines += [
                f"  {name}: {there} in the cache, {here} here ({what})"
                for name, (there, here) in differing.items()
            ]
        if not drift.environment_differs:
            lines.append("  all library versions that affect pixels are those of the cache")
        if drift.num_views:
            lines.append(
                f"  {drift.num_exact} of {drift.num_views} views are identical; mean"
                f" difference of {drift.num_witnesses} witnesses at most"
                f" {drift.witness_drift or 0:.3g}/255"
            )
            lines += [f"  {problem}" for problem in drift.problems[:5]]
        else:
            lines.append("  no view was drawn again: pass --data-dir to compare pixels")
    failure = None
    if drift is not None and drift.drifts:
        failure = CacheMismatch(
            f"{drift.path}: this machine does not redraw it exactly (mean difference up to"
            f" {drift.witness_drift or 0:.3g}/255). Install the versions of the cache, or train"
            " with --allow-pixel-drift X"
        )
    emit(diagnosis.model_dump(mode="json"), lines, as_json=as_json, failure=failure)
