"""Construction of objectives by the names that command lines and recipes use."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from scalekd.distillation.config import ObjectiveName, ScaleKDConfig
from scalekd.distillation.feature_objective import FeaturesObjective, ScaleKDObjective
from scalekd.distillation.feature_terms import StudentLevel, TeacherFeatures
from scalekd.distillation.form import LIGHT, PUBLISHED
from scalekd.distillation.objective import KDObjective, Objective, PlainObjective
from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape

FORMS = {"scalekd": PUBLISHED, "scalekd-light": LIGHT, "features": LIGHT}
"""The objectives that compare features, by name."""


def build_objective(
    name: ObjectiveName,
    config: ScaleKDConfig | None = None,
    *,
    student_levels: Sequence[StudentLevel] | None = None,
    teacher_stages: Mapping[int, FeatureShape] | None = None,
    tail: nn.Module | None = None,
    student_features: int | None = None,
    name_of_teacher: str = "base",
    others: Mapping[str, TeacherFeatures] = MappingProxyType({}),
) -> Objective:
    """Build an objective by name.

    Args:
        name: ``"scalekd"``, ``"scalekd-light"``, ``"features"`` (no labels, no logits), ``"kd"``
            (logits only) or ``"none"`` (no teacher).
        config: Settings of all objectives; each reads the fields that it uses.
        student_levels: Shapes of the student's last two levels; only the feature objectives use
            them, see `ScaleKDObjective`.
        teacher_stages: Shapes of the teacher's stages; only the feature objectives use them.
        tail: The teacher's tail; only the feature objectives use it.
        student_features: Width of the student's pooled features; only the summary loss uses it.
        name_of_teacher: Name of the teacher, where there are several.
        others: Further teachers whose features are compared, by name.

    Raises:
        UsageError: The name is unknown, or the objective cannot be built as configured.
    """
    if name == "none":
        return PlainObjective(config)
    if name == "kd":
        return KDObjective(config)
    if name not in FORMS:
        raise UsageError(f"unknown objective {name!r}; known are {', '.join(FORMS)}, kd and none")
    if student_levels is None or teacher_stages is None:
        raise UsageError(
            f"the {name} objective needs the shapes of the student's levels and of the teacher's "
            "stages; a cache of logits only serves the objective 'kd'"
        )
    build = FeaturesObjective if name == "features" else ScaleKDObjective
    return build(
        config,
        form=FORMS[name],
        student_levels=student_levels,
        teacher_stages=teacher_stages,
        tail=tail,
        student_features=student_features,
        name=name_of_teacher,
        others=others,
    )
