"""``scalekd models``."""

import click

from scalekd.cli._options import json_option
from scalekd.cli._output import emit


@click.command("models")
@json_option
def command(*, as_json: bool) -> None:
    """List the short names of teachers and students, and the targets of each model family."""
    from scalekd.students import ALIASES as STUDENT_ALIASES
    from scalekd.teachers import ALIASES
    from scalekd.teachers.families import FAMILIES, Family
    from scalekd.teachers.features_only import FeaturesOnly

    known: list[Family | type[Family]] = [*FAMILIES.values(), FeaturesOnly]
    families = [
        {
            "family": family.name,
            "models": family.about,
            "features": True,
            "tail": family.name in FAMILIES,
        }
        for family in known
    ]
    lines = ["teachers"]
    lines += [f"  {alias:<20}{name}" for alias, name in sorted(ALIASES.items())]
    lines += ["students"]
    lines += [f"  {alias:<20}{name}" for alias, name in sorted(STUDENT_ALIASES.items())]
    lines.append("families of teachers (logits: of every model with a classifier)")
    lines += [
        f"  {row['family']:<10}"
        + ("features and tail  " if row["tail"] else "features; tpp=false ")
        + str(row["models"])
        for row in families
    ]
    emit(
        {
            "teachers": dict(sorted(ALIASES.items())),
            "families": families,
            "students": dict(sorted(STUDENT_ALIASES.items())),
        },
        lines,
        as_json=as_json,
    )
