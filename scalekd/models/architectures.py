"""Architectures of published students that timm has no name for, registered with timm.

A model built from one of these names opens wherever this module was imported; plain timm does not
know the name: `import_for` gives the line that an exported model needs.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer, _cfg, _create_mixer

__all__ = ["import_for", "mixer_b14_224"]

default_cfgs = generate_default_cfgs({"mixer_b14_224.untrained": _cfg()})


@register_model
def mixer_b14_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Build Mixer-B on patches of 14 x 14 pixels; timm's ``mixer_b16_224`` fixes them at 16."""
    return _create_mixer(
        "mixer_b14_224",
        pretrained=pretrained,
        **{"patch_size": 14, "num_blocks": 12, "embed_dim": 768, **kwargs},
    )


def import_for(architecture: str) -> str | None:
    """The import that registers an architecture with timm, or None where timm has it itself."""
    return f"import {__name__}" if architecture in default_cfgs else None
