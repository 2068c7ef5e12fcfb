"""``scalekd doctor``."""

from typing import Any

import click

from scalekd.cli._image_options import image_options, taken_options
from scalekd.cli._options import json_option
from scalekd.cli._output import emit
from scalekd.cli._paths import check_paths
from scalekd.errors import CacheMismatch, DataError, ScaleKDError


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
@click.option(
    "--images",
    default=2000,
    show_default=True,
    type=click.IntRange(min=0),
    help="Number of images of --data-dir to decode, spread over the set; 0 decodes all. Not used "
    "with --cache.",
)
@image_options()
@json_option
def command(
    *,
    cache: str | None,
    data_dir: str | None,
    split: str,
    views: int,
    images: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Check this machine, an image set, and that a cache's views are redrawn exactly.

    The exit code is 3 if images cannot be decoded, and 4 if views of the cache differ.
    """
    check_paths(cache=cache, data_dir=data_dir)

    from scalekd.pipelines.doctor import diagnose

    diagnosis = diagnose(
        cache,
        data_dir=data_dir,
        split=split,
        image_options=taken_options(options),
        num_views=views,
        num_images=images,
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
    failure: ScaleKDError | None = None
    if drift is not None and drift.drifts:
        failure = CacheMismatch(
            f"{drift.path}: this machine does not redraw it exactly (mean difference up to"
            f" {drift.witness_drift or 0:.3g}/255). Install the versions of the cache, or train"
            " with --allow-pixel-drift X"
        )
    check = diagnosis.images.check if diagnosis.images is not None else None
    if check is not None and check.num_unreadable:
        failure = DataError(
            f"{data_dir}: {check.num_unreadable:,} of {check.num_decoded:,} images cannot be"
            f" decoded, first: {check.problems[0]}. Replace or remove them, or leave them out with"
            " cache-teacher --skip-corrupt"
        )
    emit(diagnosis.model_dump(mode="json"), lines, as_json=as_json, failure=failure)
