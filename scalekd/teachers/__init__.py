"""Teachers: frozen timm models, their features, and their tails.

Example:
    >>> from scalekd.teachers import TeacherConfig, load_teacher
    >>> teacher = load_teacher(TeacherConfig(model="swin_t", pretrained=False))
    >>> teacher.spec.stages[4].grid, teacher.spec.stages[4].num_channels
    ((7, 7), 768)
"""

from typing import TYPE_CHECKING

from scalekd._lazy import lazy

if TYPE_CHECKING:
    from scalekd.teachers.class_token import has_class_token
    from scalekd.teachers.features_only import FEATURES_ONLY
    from scalekd.teachers.heads import match_teacher
    from scalekd.teachers.names import (
        ALIASES,
        LIVE_TEACHER_ADVICE,
        resolve_model_name,
        teacher_named_by_cache,
    )
    from scalekd.teachers.own import teacher_from_module
    from scalekd.teachers.spec import ABOUT_ORIGIN, TeacherConfig, TeacherSpec
    from scalekd.teachers.tail import Tail, TailConfig
    from scalekd.teachers.tail_file import inspect_tail, load_tail, load_tail_bytes, save_tail
    from scalekd.teachers.teacher import Teacher, TeacherOutput, load_teacher

__all__ = [
    "ABOUT_ORIGIN",
    "ALIASES",
    "FEATURES_ONLY",
    "LIVE_TEACHER_ADVICE",
    "Tail",
    "TailConfig",
    "Teacher",
    "TeacherConfig",
    "TeacherOutput",
    "TeacherSpec",
    "has_class_token",
    "inspect_tail",
    "load_tail",
    "load_tail_bytes",
    "load_teacher",
    "match_teacher",
    "resolve_model_name",
    "save_tail",
    "teacher_from_module",
    "teacher_named_by_cache",
]

__getattr__ = lazy(__name__, __file__)
