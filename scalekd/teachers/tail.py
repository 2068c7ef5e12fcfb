"""The tail of a teacher: its last stage, norm and head.

Teacher parameter perception sends the student's stage-3 projection through this frozen tail. A
student run does not need the whole teacher, so the tail is cut from a model built without memory
(on torch's ``meta`` device), and only the tail is allocated and filled.

A student's projection has no prefix tokens (class, distillation, register). The tail has constant
ones: the mean, over calibration images, of the prefix tokens that enter it in the teacher.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from scalekd.shapes import FeatureShape
from scalekd.teachers.families import FAMILIES, Family

NO_PREFIX = (
    "the tail's constant prefix tokens were never set: call "
    "teacher.calibrate_prefix(stage-3 features) before teacher.tail()"
)


class TailConfig(BaseModel):
    """The configuration that rebuilds the modules of a tail; stored in the tail file as JSON.

    Attributes:
        format_version: Version of the tail file's format.
        architecture: Name of the model in timm, without tag.
        family: Name of the family in :data:`~scalekd.teachers.families.FAMILIES`.
        model_kwargs: Constructor arguments that differ from timm's defaults.
        img_size: Height and width of the teacher's input, in pixels.
        num_classes: Number of outputs of the head; 0 without a head.
        global_pool: timm's name of the pooling before the head.
        tail_blocks: Number of blocks of a ViT in the tail.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format_version: Literal[1] = 1
    architecture: str
    family: Literal["swin", "vit", "beit", "eva"]
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    img_size: tuple[int, int]
    num_classes: int = Field(ge=0)
    global_pool: str
    tail_blocks: int = Field(default=2, ge=1)


class Tail(nn.Module):
    """Frozen modules from stage 3 to the logits, always in eval mode. Gradients flow through them.

    Attributes:
        config: Configuration that the tail was built from.
        stages: Shapes of its input (3) and output (4), including prefix tokens.
    """

    prefix_tokens: Tensor | None
    rope: Tensor | None

    def __init__(
        self,
        config: TailConfig,
        cut: nn.Module,
        *,
        family: Family,
        stages: Mapping[int, FeatureShape],
        rope: Tensor | None,
    ) -> None:
        """Wrap modules; use :meth:`from_config`, ``teacher.tail()`` or :func:`load_tail`."""
        super().__init__()
        self.config = config
        self.stages = dict(stages)
        self.family = family
        self.model = cut
        self.grad_checkpointing = False
        self.register_buffer("rope", rope)
        self.register_buffer("prefix_tokens", None)
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def from_config(cls, config: TailConfig) -> Self:
        """Build the modules, allocated with undefined values, without the rest of the teacher.

        Fill it with ``load_state_dict``; tables that timm computes are already filled.

        Raises:
            UsageError: timm cannot build the architecture with these arguments.
        """
        return cls.on_meta(config).allocated()

    @classmethod
    def on_meta(cls, config: TailConfig) -> Self:
        """Build the modules on torch's meta device, with shapes but without memory."""
        from scalekd.models.build import create_on_meta

        family = FAMILIES[config.family]
        model = create_on_meta(
            config.architecture,
            {
                **config.model_kwargs,
                "img_size": config.img_size,
                "num_classes": config.num_classes,
                "global_pool": config.global_pool,
            },
        ).eval()
        family.check(model, config.tail_blocks)
        stages = family.stages(model, config.tail_blocks)
        rope = family.rope(model, config.tail_blocks)
        family.cut(model, config.tail_blocks)
        return cls(config, model, family=family, stages=stages, rope=rope)

    def allocated(self) -> Self:
        """Allocate a tail built by :meth:`on_meta`, and compute its tables."""
        self.to_empty(device="cpu")
        for module in self.modules():
            init = getattr(module, "init_non_persistent_buffers", None)
            if callable(init):
                init()
        return self

    @property
    def num_prefix_tokens(self) -> int:
        return self.stages[3].num_prefix_tokens

    @property
    def num_classes(self) -> int | None:
        """Number of logits; ``None`` for a teacher without a head."""
        return self.config.num_classes or None

    def set_prefix_tokens(self, prefix: Float[Tensor, "prefix channel"]) -> None:
        """Set the constant prefix tokens.

        Raises:
            ValueError: The shape is not ``(prefix tokens, channels)`` of stage 3.
        """
        self._check_prefix(prefix.shape)
        parameter = next(self.parameters())
        self.prefix_tokens = prefix.detach().to(parameter.device, parameter.dtype).clone()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward(
        self,
        tokens: Float[Tensor, "batch patch channel3"],
        prefix_tokens: Float[Tensor, "batch prefix channel3"] | None = None,
    ) -> Float[Tensor, "batch final_patch channel4"]:
        """Send patch tokens through the teacher's last stage.

        Args:
            tokens: Patch tokens of stage 3, row by row; gradients flow back to them.
            prefix_tokens: Prefix tokens of the same images; by default the constant ones.

        Returns:
            Patch tokens of the final stage, after the last norm.

        Raises:
            ValueError: A shape is wrong, or constant prefix tokens are needed and were not set.
        """
        features = self.forward_features(tokens, prefix_tokens)
        return features[:, self.stages[4].num_prefix_tokens :]

    def forward_features(
        self,
        tokens: Float[Tensor, "batch patch channel3"],
        prefix_tokens: Float[Tensor, "batch prefix channel3"] | None = None,
    ) -> Float[Tensor, "batch final_token channel4"]:
        """Do :meth:`forward`, but keep the prefix tokens, as :meth:`head` needs them."""
        shape = self.stages[3]
        if tokens.ndim != 3 or tokens.shape[1:] != (shape.num_patch_tokens, shape.num_channels):
            raise ValueError(
                f"the tail takes (batch, {shape.num_patch_tokens}, {shape.num_channels}) patch "
                f"tokens of a {shape.grid[0]} x {shape.grid[1]} grid, not {tuple(tokens.shape)}"
            )
        if shape.num_prefix_tokens:
            tokens = torch.cat([self._prefix_for(tokens, prefix_tokens), tokens], dim=1)
        return self.family.run_tail(
            self.model, tokens, self.rope, checkpointed=self.grad_checkpointing
        )

    def head(
        self, features: Float[Tensor, "batch final_token channel4"]
    ) -> Float[Tensor, "batch cls"]:
        """Compute logits from final-stage features with prefix tokens, by the teacher's head.

        Raises:
            ValueError: The teacher has no head, or the features have another shape.
        """
        if self.num_classes is None:
            raise ValueError(f"{self.config.architecture} was loaded without a classification head")
        shape = self.stages[4]
        if features.ndim != 3 or features.shape[1:] != (shape.num_tokens, shape.num_channels):
            raise ValueError(
                f"the head takes (batch, {shape.num_tokens}, {shape.num_channels}) features with "
                f"{shape.num_prefix_tokens} prefix tokens, not {tuple(features.shape)}"
            )
        return self.family.run_head(self.model, features)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the tail stays in eval mode."""
        return self

    def _prefix_for(self, tokens: Tensor, given: Tensor | None) -> Tensor:
        prefix = self.prefix_tokens if given is None else given
        if prefix is None:
            raise ValueError(NO_PREFIX)
        self._check_prefix(prefix.shape[-2:])
        return prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1)

    def _check_prefix(self, shape: Sequence[int]) -> None:
        wanted = (self.num_prefix_tokens, self.stages[3].num_channels)
        if tuple(shape) != wanted:
            raise ValueError(f"prefix tokens of shape {tuple(shape)}; this tail takes {wanted}")

    def extra_repr(self) -> str:
        return json.dumps(self.config.model_dump(mode="json"))
