"""Checks of a plan's numbers against limits and against one another.

A cache may come from an untrusted source. Its plan describes the teacher, and the sizes of student,
projectors and tail follow from that description: a forged number would request more memory than any
machine has, long after the cache was opened. All such numbers are checked when the plan is read.
"""

import math
from typing import TYPE_CHECKING

from scalekd.shapes import FeatureShape
from scalekd.teachers import TeacherSpec

if TYPE_CHECKING:
    from scalekd.cache.documents.manifest import Identity

# Far above any published backbone: 40 blocks, 4,096 channels, 21,841 classes, 1,024 pixels.
_MAX_CHANNELS = 1 << 14
_MAX_SIDE = 1 << 10
_MAX_PREFIX_TOKENS = 1 << 10
_MAX_VIEW_VALUES = 1 << 26
_MAX_CLASSES = 1 << 18
_MAX_TAIL_BLOCKS = 256
_MAX_TEXT = 4096
_MAX_WITNESSES = 64
_MAX_WITNESS_HEADER = 64 << 10


def check_identity(identity: "Identity") -> None:
    """Compare the teacher's description with stages, logits, views and request.

    Raises:
        ValueError: Two of them disagree, or a number exceeds its limit.
    """
    teacher = TeacherSpec.model_validate(identity.teacher)
    check_teacher(teacher)
    if teacher.img_size != identity.views.view_size:
        raise ValueError(
            f"the teacher takes {_size(teacher.img_size)} pixels and the views have"
            f" {_size(identity.views.view_size)}"
        )
    for name, stage in identity.stages.items():
        if teacher.stages[int(name)] != stage.shape:
            raise ValueError(
                f"stage {name} of the teacher is {_shape(teacher.stages[int(name)])}, and the cache"
                f" stores {_shape(stage.shape)}"
            )
        tables = stage.codec.tables
        if tables is not None and not tables.startswith(f"tables/stage{name}-"):
            raise ValueError(f"the codec tables of stage {name} are not {tables!r}")
    if identity.logits is not None:
        stored = identity.logits.config.get("num_classes")
        if stored != teacher.num_classes:
            raise ValueError(
                f"the teacher has {teacher.num_classes} classes and the logits {str(stored)[:40]}"
            )
        if identity.logits.tables is not None:
            raise ValueError("logits have no codec tables")
    if (identity.tail is None) != (identity.tail_digest is None):
        raise ValueError("tail and tail_digest are given together or not at all")
    height, width = identity.views.view_size
    most = _MAX_WITNESS_HEADER + _MAX_WITNESSES * height * width * 3
    if identity.views.witnesses_digest.num_bytes > most:
        raise ValueError(
            f"witnesses of {identity.views.witnesses_digest.num_bytes:,} bytes are more than"
            f" {_MAX_WITNESSES} views of {_size(identity.views.view_size)} pixels"
        )
    kept = sorted(int(stage) for stage in identity.stages)
    if sorted(identity.request["stages"]) != kept:
        raise ValueError(
            f"the request names stages {identity.request['stages']}, and the cache has {kept}"
        )


def check_teacher(teacher: TeacherSpec) -> None:
    """Raise ``ValueError`` if a number of a teacher's description exceeds any real backbone's.

    Only numbers on which memory or time depend are checked.
    """
    if set(teacher.stages) != {3, 4}:
        raise ValueError(f"the teacher has stages {sorted(teacher.stages)[:8]}, not 3 and 4")
    for stage, shape in teacher.stages.items():
        if (
            max(shape.grid) > _MAX_SIDE
            or shape.num_channels > _MAX_CHANNELS
            or shape.num_prefix_tokens > _MAX_PREFIX_TOKENS
            or shape.num_tokens * shape.num_channels > _MAX_VIEW_VALUES
        ):
            raise ValueError(f"stage {stage} of the teacher has {_shape(shape)}: beyond the limits")
    if teacher.num_classes is not None and not 1 <= teacher.num_classes <= _MAX_CLASSES:
        raise ValueError(
            f"the teacher has {teacher.num_classes} classes, outside 1 to {_MAX_CLASSES:,}"
        )
    if teacher.tail_blocks > _MAX_TAIL_BLOCKS:
        raise ValueError(f"a tail of {teacher.tail_blocks} blocks is more than {_MAX_TAIL_BLOCKS}")
    numbers = (*teacher.mean, *teacher.std, teacher.crop_pct)
    if not all(math.isfinite(number) and abs(number) <= 1e3 for number in numbers):
        raise ValueError("mean, std or crop_pct of the teacher is beyond 1,000")
    if min(*teacher.std, teacher.crop_pct) <= 0:
        raise ValueError("std and crop_pct of the teacher must be positive")
    for name in ("model", "architecture", "family", "interpolation", "licence"):
        text = getattr(teacher, name)
        if text is not None and len(text) > _MAX_TEXT:
            raise ValueError(f"{name} of the teacher has {len(text):,} characters")


def _shape(shape: FeatureShape) -> str:
    return (
        f"{shape.grid[0]} x {shape.grid[1]} tokens of {shape.num_channels} channels and"
        f" {shape.num_prefix_tokens} prefix tokens"
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
