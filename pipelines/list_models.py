"""List the teachers and students known by a short name, and what each teacher family provides."""

from pydantic import BaseModel

from scalekd.students import ALIASES as STUDENT_ALIASES
from scalekd.teachers import ALIASES as TEACHER_ALIASES
from scalekd.teachers.families import FAMILIES, Family
from scalekd.teachers.features_only import FeaturesOnly


class ListedFamily(BaseModel):
    """A family of teachers.

    Attributes:
        family: Name of the family.
        models: Description of its models.
        features: Whether its features can be cached.
        tail: Whether it has a tail, which teacher parameter perception needs.
    """

    family: str
    models: str
    features: bool = True
    tail: bool


class KnownModels(BaseModel):
    """Result of ``scalekd models``: short names with their model names, and teacher families."""

    teachers: dict[str, str]
    families: tuple[ListedFamily, ...]
    students: dict[str, str]

    def lines(self) -> list[str]:
        """Return the lines to print."""
        lines = []
        for title, aliases in (("teachers", self.teachers), ("students", self.students)):
            lines += [title, *(f"  {alias:<20}{name}" for alias, name in aliases.items())]
        lines.append("families of teachers (logits: of every model with a classifier)")
        for row in self.families:
            provided = "features and tail  " if row.tail else "features; tpp=false "
            lines.append(f"  {row.family:<10}{provided}{row.models}")
        return lines


def list_models() -> KnownModels:
    """Return the short names and the teacher families."""
    families: list[Family | type[Family]] = [*FAMILIES.values(), FeaturesOnly]
    return KnownModels(
        teachers=dict(sorted(TEACHER_ALIASES.items())),
        families=tuple(
            ListedFamily(family=family.name, models=family.about, tail=family.name in FAMILIES)
            for family in families
        ),
        students=dict(sorted(STUDENT_ALIASES.items())),
    )
