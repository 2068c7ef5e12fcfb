"""Short names of teachers, and their resolution to timm models."""

import re

from scalekd.errors import UsageError
from scalekd.models.names import resolve_name

# Tags as in the ScaleKD paper where it used the model: Swin-L and Swin-B pre-trained on
# ImageNet-22K and fine-tuned at 224 px, Swin-S on ImageNet-1K alone; for the others, timm's
# strongest classifier at the usual size, and features without a head for DINO.
ALIASES: dict[str, str] = {
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_l": "swin_large_patch4_window7_224.ms_in22k_ft_in1k",
    "swinv2": "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k",
    "swinv2_b": "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k",
    "swinv2_l": "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k",
    "beit_b": "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "beit_l": "beit_large_patch16_224.in22k_ft_in22k_in1k",
    "beitv2_b": "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
    "beitv2_l": "beitv2_large_patch16_224.in1k_ft_in22k_in1k",
    "eva_l": "eva_large_patch14_196.in22k_ft_in22k_in1k",
    "eva_l336": "eva_large_patch14_336.in22k_ft_in22k_in1k",
    "eva02_s": "eva02_small_patch14_336.mim_in22k_ft_in1k",
    "eva02_b": "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",
    "eva02_l": "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",
    "deit3_s": "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "deit3_b": "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "deit3_l": "deit3_large_patch16_224.fb_in22k_ft_in1k",
    "deit3_h": "deit3_huge_patch14_224.fb_in22k_ft_in1k",
    "dinov2_s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_l": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_g": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2_reg_s": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_reg_b": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_reg_l": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov3_s": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_l": "vit_large_patch16_dinov3.lvd1689m",
    "dinov3_h": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "siglip_b": "vit_base_patch16_siglip_224.v2_webli",
    "siglip_l": "vit_large_patch16_siglip_256.v2_webli",
    "siglip_so400m": "vit_so400m_patch14_siglip_224.v2_webli",
    "clip_b32": "vit_base_patch32_clip_224.openai",
    "clip_b": "vit_base_patch16_clip_224.openai",
    "clip_l": "vit_large_patch14_clip_224.openai",
    "pe_b": "vit_pe_core_base_patch16_224.fb",
    "pe_l": "vit_pe_core_large_patch14_336.fb",
    "convnext_b": "convnext_base.fb_in22k_ft_in1k",
    "convnext_l": "convnext_large.fb_in22k_ft_in1k",
    "hiera_b": "hiera_base_224.mae_in1k_ft_in1k",
    "maxvit_b": "maxvit_base_tf_224.in1k",
    "vit_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_l": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_l14": "vit_large_patch14_clip_224.openai_ft_in12k_in1k",
}


LIVE_TEACHER_ADVICE = {
    ", or --no-pretrained for random ones": "",
    ". Classes, image size and widths are set with --model-kwargs and --img-size": "",
    "--checkpoint": "--teacher-checkpoint",
}
"""Replacements for messages about a teacher's weights in commands whose options set another model;
for :func:`scalekd.errors.rewording`."""


# Teachers whose own image size is meant for dense features; smaller views cost less to draw, store
# and compute, and give a token grid (16 x 16, 14 x 14) near the maps of a student.
ALIAS_SIZES: dict[str, int] = {
    alias: 224
    for alias in ALIASES
    if alias.startswith(("dinov2_", "dinov3_")) or alias in ("siglip_l", "pe_l")
}


def resolve_model_name(name: str) -> tuple[str, str | None]:
    """Expand a name from the user to the full name of a timm model.

    Args:
        name: An alias, ``architecture``, ``architecture.tag``, ``hf-hub:owner/name``,
            ``local-dir:path`` or the path of a folder that timm exported.

    Returns:
        The full name (``architecture.tag``, ``hf-hub:…`` or ``local-dir:`` with an absolute path),
        and a sentence to print if it differs from ``name``.

    Raises:
        UsageError: The name is unknown; the message suggests similar ones.
    """
    resolved, sentence = resolve_name(name, ALIASES)
    if sentence is not None and (side := ALIAS_SIZES.get(name.strip())) is not None:
        sentence += f", at {side} x {side} px unless --img-size is given"
    return resolved, sentence


def teacher_named_by_cache(name: str, *, option: str) -> str:
    """Return the teacher's name from a cache, if it is the name of a timm model.

    A cache is not trusted: its name of the teacher must not download an unknown repository or read
    a folder of this machine. The user can name either with ``option``.

    Args:
        name: Name of the teacher in the cache's plan.
        option: Option with which the user names the teacher, for the message.

    Raises:
        UsageError: The name is that of a repository or a folder, or is unknown to timm.
    """
    from timm.models import is_model

    if re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", name) and is_model(name.split(".")[0]):
        return name
    raise UsageError(
        f"the cache names its teacher {name!r}, which is not a model of timm; if you know"
        f" and trust it, name it with {option}"
    )
