"""Whether a teacher's first prefix token is a class token."""

from scalekd.errors import UsageError
from scalekd.models.build import create_on_meta
from scalekd.teachers.spec import TeacherSpec


def has_class_token(spec: TeacherSpec) -> bool:
    """Return whether the first token of a teacher's features is its class token.

    timm puts the class token before distillation and register tokens. Some models have only
    registers, such as ``vit_medium_patch16_reg4_gap_256``, and SigLIP has no prefix tokens.
    """
    if not spec.stages[4].num_prefix_tokens:
        return False
    try:
        model = create_on_meta(spec.architecture, spec.model_kwargs)
    except UsageError:  # an architecture of another version of timm; most have a class token
        return True
    return getattr(model, "cls_token", None) is not None
