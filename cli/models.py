"""``scalekd models``."""

import click

from scalekd.cli._options import json_option
from scalekd.cli._output import emit


@click.command("models")
@json_option
def command(*, as_json: bool) -> None:
    """List the teachers and students known by a short name, and what each stands for."""
    from scalekd.students import ALIASES as STUDENT_ALIASES
    from scalekd.teachers import ALIASES

    lines = ["teachers"]
    lines += [f"  {alias:<20}{name}" for alias, name in sorted(ALIASES.items())]
    lines += ["students"]
    lines += [f"  {alias:<20}{name}" for alias, name in sorted(STUDENT_ALIASES.items())]
    lines.append("and any timm model of the families that README names")
    emit(
        {
            "teachers": dict(sorted(ALIASES.items())),
            "students": dict(sorted(STUDENT_ALIASES.items())),
        },
        lines,
        as_json=as_json,
    )
