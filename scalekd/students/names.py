"""Short names of the paper's students, and the way from a typed name to a timm model."""

from scalekd.models.names import resolve_name

# timm's published weights for each architecture give preprocessing and, if asked for, a start.
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
    """As :func:`scalekd.teachers.resolve_model_name`, with the students' aliases.

    Raises:
        UsageError: Nothing has this name; the message suggests the nearest ones.
    """
    return resolve_name(name, ALIASES)
