"""Architectures of published students that timm does not have, registered with timm.

A model with one of these names opens in programs that import this module: `import_for` returns the
import that an exported model needs.
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
    """Return the import that registers an architecture with timm; ``None`` for timm's own."""
    return f"import {__name__}" if architecture in default_cfgs else None
