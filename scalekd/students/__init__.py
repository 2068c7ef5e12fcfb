"""Students: timm models whose last two feature maps distillation reads.

Example:
    >>> from scalekd.students import create_student
    >>> student = create_student("resnet18", num_classes=10, img_size=64)
    >>> [(level.num_channels, level.grid) for level in student.spec.levels]
    [(256, (4, 4)), (512, (2, 2))]
"""

from scalekd.students.names import ALIASES, resolve_student_name
from scalekd.students.spec import StudentSpec
from scalekd.students.student import Student, StudentOutput, create_student

__all__ = [
    "ALIASES",
    "Student",
    "StudentOutput",
    "StudentSpec",
    "create_student",
    "resolve_student_name",
]
