"""Short names of the paper's students, and their resolution to timm models."""

from scalekd.models.names import resolve_name

# The published weights that timm describes for each architecture; they define the preprocessing.
ALIASES: dict[str, str] = {
    "mobilenet_v1": "mobilenetv1_100.ra4_e3600_r224_in1k",
    "convnext_t": "convnext_tiny.fb_in1k",
    "mixer_s16": "mixer_s16_224",
    "mixer_b16": "mixer_b16_224.goog_in21k_ft_in1k",
    "mixer_b14": "mixer_b14_224",
    "vit_s16": "vit_small_patch16_224.augreg_in1k",
    "vit_b16": "vit_base_patch16_224.augreg_in1k",
    "deit_s": "deit_small_patch16_224.fb_in1k",
    "deit_b": "deit_base_patch16_224.fb_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
}


def resolve_student_name(name: str) -> tuple[str, str | None]:
    """Expand a student's name; see :func:`scalekd.teachers.resolve_model_name`.

    Raises:
        UsageError: The name is unknown; the message suggests similar ones.
    """
    return resolve_name(name, ALIASES)
