"""Families of timm backbones with a known last stage, the tail.

A family defines the shapes of the last two stages, how to compute them in one forward pass, how to
reduce the model to its tail, and how to run the tail. Heads always run by timm's own
``forward_head``, with the pooling and final norm of the model.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from timm.models import is_model_in_modules
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape

TimmModel = Any  # timm's models follow conventions that have no type
Tokens = Float[Tensor, "batch token channel"]


class Family:
    """The architecture-specific functions of a teacher. Instances have no state."""

    name: ClassVar[str]
    about: ClassVar[str]  # common names of its models
    model_classes: ClassVar[tuple[type[nn.Module], ...]]
    modules: ClassVar[tuple[str, ...]]  # modules of timm whose entry points a tail file may name
    kept: ClassVar[frozenset[str]]  # direct submodules that a tail keeps

    def check(self, model: TimmModel, tail_blocks: int) -> None:
        """Check that the model has a last stage of ``tail_blocks`` blocks.

        Raises:
            UsageError: It has not.
        """

    def size_multiple(self, model: TimmModel) -> tuple[int, int]:
        """Return the pixels that the input's height and width must be multiples of."""
        return 1, 1

    def stages(self, model: TimmModel, tail_blocks: int) -> dict[int, FeatureShape]:
        """Return the shapes of stages 3 and 4 at the image size the model was built for."""
        raise NotImplementedError

    def forward(
        self, model: TimmModel, images: Float[Tensor, "batch 3 height width"], tail_blocks: int
    ) -> tuple[Tokens, Tokens]:
        """Compute the features of both stages, with prefix tokens, in one forward pass."""
        raise NotImplementedError

    def cut(self, model: TimmModel, tail_blocks: int) -> None:
        """Remove, in place, all modules that run before the last stage."""
        raise NotImplementedError

    def tail_name(self, name: str, model: TimmModel, tail_blocks: int) -> str | None:
        """Return the name in a cut model of a tensor of the whole one; ``None`` if it was cut."""
        raise NotImplementedError

    def pooling(self, model: TimmModel) -> str:
        """Return timm's name of the pooling before the head."""
        return str(model.global_pool)

    def rope(self, model: TimmModel, tail_blocks: int) -> Tensor | None:
        """Return the rotary embedding of the tail's blocks; ``None`` for most families."""
        return None

    def run_tail(
        self, cut: TimmModel, tokens: Tokens, rope: Tensor | None, *, checkpointed: bool
    ) -> Tokens:
        """Compute stage 4 from stage 3, both with prefix tokens."""
        raise NotImplementedError

    def outputs(
        self, model: TimmModel, images: Tensor, tail_blocks: int, *, logits: bool
    ) -> tuple[Tokens, Tokens, Float[Tensor, "batch cls"] | None]:
        """Compute the features of both stages, and logits if requested, in one forward pass."""
        stage3, stage4 = self.forward(model, images, tail_blocks)
        return stage3, stage4, self.run_head(model, stage4) if logits else None

    def run_head(self, model: TimmModel, features: Tokens) -> Float[Tensor, "batch cls"]:
        """Compute logits from stage 4 with prefix tokens."""
        return cast(Tensor, model.forward_head(features))


def _drop(model: TimmModel, kept: frozenset[str]) -> None:
    for name, _ in list(model.named_children()):
        if name not in kept:
            setattr(model, name, None)
    for name, _ in list(model.named_parameters(recurse=False)):
        setattr(model, name, None)
    for name, _ in list(model.named_buffers(recurse=False)):
        delattr(model, name)


class SwinFamily(Family):
    """Swin and Swin V2: the last stage is ``layers[-1]``, patch merging included."""

    name = "swin"
    about = "Swin, Swin V2"
    model_classes = (SwinTransformer, SwinTransformerV2)
    modules = ("swin_transformer", "swin_transformer_v2")
    kept = frozenset({"layers", "norm", "head"})

    def check(self, model: TimmModel, tail_blocks: int) -> None:
        if len(model.layers) < 2:
            raise UsageError("a Swin teacher needs at least two stages; this one has one")

    def size_multiple(self, model: TimmModel) -> tuple[int, int]:
        height, width = model.patch_embed.patch_size
        return int(height), int(width)

    def stages(self, model: TimmModel, tail_blocks: int) -> dict[int, FeatureShape]:
        shapes = {}
        for stage, layer in zip((3, 4), list(model.layers)[-2:], strict=True):
            width = layer.blocks[0].dim
            shapes[stage] = FeatureShape(tuple(layer.output_resolution), width)
        return shapes

    def forward(self, model: TimmModel, images: Tensor, tail_blocks: int) -> tuple[Tokens, Tokens]:
        penultimate = len(model.layers) - 2
        final, (stage3,) = model.forward_intermediates(images, indices=[penultimate])
        return stage3.flatten(2).transpose(1, 2), final.flatten(1, 2)

    def cut(self, model: TimmModel, tail_blocks: int) -> None:
        model.layers = nn.Sequential(list(model.layers)[-1])
        _drop(model, self.kept)

    def tail_name(self, name: str, model: TimmModel, tail_blocks: int) -> str | None:
        root, _, rest = name.partition(".")
        if root == "layers":
            index, _, rest = rest.partition(".")
            return f"layers.0.{rest}" if int(index) == len(model.layers) - 1 else None
        return name if root in self.kept else None

    def run_tail(
        self, cut: TimmModel, tokens: Tokens, rope: Tensor | None, *, checkpointed: bool
    ) -> Tokens:
        layer = cut.layers[0]
        x = layer.downsample(_as_map(tokens, layer.input_resolution))
        for block in layer.blocks:
            x = _run(block, x, {}, checkpointed)
        return cast(Tensor, cut.norm(x).flatten(1, 2))

    def run_head(self, model: TimmModel, features: Tokens) -> Float[Tensor, "batch cls"]:
        features = _as_map(features, model.layers[-1].output_resolution)
        return cast(Tensor, model.forward_head(features))


class ViTFamily(Family):
    """ViT, DeiT, DeiT3, DINOv2: the last stage is the last blocks and the norm after them."""

    name = "vit"
    about = "ViT, DeiT, DeiT3, DINOv2, CLIP, SigLIP"
    model_classes: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer,)
    modules: ClassVar[tuple[str, ...]] = (
        "vision_transformer",
        "vision_transformer_hybrid",
        "deit",
        "vitamin",
    )
    kept = frozenset({"blocks", "norm", "fc_norm", "attn_pool", "head", "head_dist", "head_drop"})

    def check(self, model: TimmModel, tail_blocks: int) -> None:
        depth = len(model.blocks)
        if depth <= tail_blocks:
            raise UsageError(
                f"a tail of {tail_blocks} blocks needs a teacher of more; this one has {depth}"
            )

    def size_multiple(self, model: TimmModel) -> tuple[int, int]:
        embed = model.patch_embed
        ratio = (
            embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else embed.patch_size
        )
        return int(ratio[0]), int(ratio[1])

    def stages(self, model: TimmModel, tail_blocks: int) -> dict[int, FeatureShape]:
        rows, columns = model.patch_embed.grid_size
        shape = FeatureShape((rows, columns), model.embed_dim, model.num_prefix_tokens)
        return {3: shape, 4: shape}

    def forward(self, model: TimmModel, images: Tensor, tail_blocks: int) -> tuple[Tokens, Tokens]:
        has_prefix = model.num_prefix_tokens > 0
        final, (stage3,) = model.forward_intermediates(
            images,
            indices=[len(model.blocks) - tail_blocks - 1],
            output_fmt="NLC",
            return_prefix_tokens=has_prefix,
        )
        if has_prefix:
            patches, prefix = stage3
            stage3 = torch.cat([prefix, patches], dim=1)
        return stage3, final

    def cut(self, model: TimmModel, tail_blocks: int) -> None:
        model.blocks = nn.ModuleList(list(model.blocks)[-tail_blocks:])
        _drop(model, self.kept)

    def tail_name(self, name: str, model: TimmModel, tail_blocks: int) -> str | None:
        root, _, rest = name.partition(".")
        if root == "blocks":
            index, _, rest = rest.partition(".")
            position = int(index) - (len(model.blocks) - tail_blocks)
            return f"blocks.{position}.{rest}" if position >= 0 else None
        return name if root in self.kept and rest else None

    def run_tail(
        self, cut: TimmModel, tokens: Tokens, rope: Tensor | None, *, checkpointed: bool
    ) -> Tokens:
        x = tokens
        for index, block in enumerate(cut.blocks):
            x = _run(block, x, self.block_kwargs(cut, rope, index), checkpointed)
        return cast(Tensor, cut.norm(x))

    def block_kwargs(self, cut: TimmModel, rope: Tensor | None, index: int) -> Mapping[str, Any]:
        """Return the arguments of a block of the tail besides its tokens."""
        return {}


class BeitFamily(ViTFamily):
    """BEiT and BEiT v2: as ViT, with relative position biases per block or shared."""

    name = "beit"
    about = "BEiT, BEiT v2"
    model_classes = (Beit,)
    modules = ("beit",)
    kept = ViTFamily.kept | {"rel_pos_bias"}

    def block_kwargs(self, cut: TimmModel, rope: Tensor | None, index: int) -> Mapping[str, Any]:
        shared = cut.rel_pos_bias
        return {"shared_rel_pos_bias": shared() if shared is not None else None}


class EvaFamily(ViTFamily):
    """EVA, EVA-02, DINOv3: as ViT, with a rotary embedding as an argument of every block."""

    name = "eva"
    about = "EVA, EVA-02, DINOv3, PE"
    model_classes = (Eva,)
    modules = ("eva",)

    def rope(self, model: TimmModel, tail_blocks: int) -> Tensor | None:
        """Compute the embedding like ``Eva._pos_embed``, for the grid of the image size."""
        eva = model
        if eva.rope is None:
            return None
        fixed = hasattr(eva.rope, "feat_shape") and not eva.dynamic_img_size
        with torch.no_grad():
            embed = eva.rope.get_embed(**({} if fixed else {"shape": eva.patch_embed.grid_size}))
        if eva.rope_mixed:  # one embedding a block
            embed = embed[-tail_blocks:]
        return cast(Tensor, embed).detach().clone()

    def block_kwargs(self, cut: TimmModel, rope: Tensor | None, index: int) -> Mapping[str, Any]:
        if rope is not None and cut.rope_mixed:
            rope = rope[index]
        return {"rope": rope}


FAMILIES: dict[str, Family] = {
    family.name: family for family in (SwinFamily(), ViTFamily(), BeitFamily(), EvaFamily())
}


def family_of(model: nn.Module, architecture: str) -> Family | None:
    """Return the family of a timm model made by the entry point ``architecture``.

    Returns ``None`` for a model without a known tail.
    """
    for family in FAMILIES.values():
        if isinstance(model, family.model_classes) and is_model_in_modules(
            architecture, family.modules
        ):
            return family
    return None


def _run(block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], checkpointed: bool) -> Tensor:
    if checkpointed and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(block, x, use_reentrant=False, **kwargs))
    return cast(Tensor, block(x, **kwargs))


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshape tokens to ``(batch, row, column, channel)``, as Swin's layers take them."""
    return tokens.reshape(len(tokens), *grid, tokens.shape[-1])
