"""Settings of the distillation objectives, which can be written as JSON.

The defaults are the recipe of most published pairs (ResNet-50, MobileNet, DeiT from Swin-L).
Each part of the method can be switched off for an ablation without touching its weights.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ObjectiveName = Literal["scalekd", "scalekd-light", "kd", "none"]
View = Literal["spatial", "frequency"]
Stage = Literal[3, 4]

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageConfig(_Frozen):
    """Settings of the projectors and losses of one stage.

    Attributes:
        spatial_weight: Weight of the spatial loss, the first entry of the published alpha. The loss
            is a sum over the teacher's tokens, so the published weights fall with their number:
            0.08 for the 49 of Swin, 0.016 for the 256 of EVA.
        frequency_weight: Weight of the frequency loss, the second entry of the published alpha.
        num_heads: Number of attention heads of this stage's projectors; ``None`` chooses heads
            about 64 wide.
        softmax_scale: Factor of the attention scores, 5 in most published pairs. A pair of numbers
            sets the spatial and the frequency projector separately.
    """

    spatial_weight: _Weight = 0.08
    frequency_weight: _Weight = 0.06
    num_heads: Annotated[int, Field(ge=1)] | None = None
    softmax_scale: _Positive | tuple[_Positive, _Positive] = 5.0

    def weight(self, view: View) -> float:
        """Return the weight of one view's loss."""
        return self.spatial_weight if view == "spatial" else self.frequency_weight

    def scale(self, view: View) -> float:
        """Return the softmax scale of one view's projector."""
        if isinstance(self.softmax_scale, tuple):
            return self.softmax_scale[0 if view == "spatial" else 1]
        return self.softmax_scale


class ScaleKDConfig(_Frozen):
    """All settings of an objective, except shapes and the teacher's tail.

    Attributes:
        stage3: Settings for the student's penultimate level, compared after the teacher's tail.
        stage4: Settings for the student's final level.
        kd_alpha: Weight of the logit loss; the weight of the task loss is ``1 - kd_alpha``.
        temperature: Softmax temperature of the logit loss.
        task: Name of the task loss in `TASK_LOSSES`.
        label_smoothing: Label smoothing of the task loss.
        norm: Norm layer of the projectors' stem.
        self_query: Whether stage-4 projectors learn their queries, instead of using the outputs of
            stage 3. (The published code has a switch of this name that such outputs override.)
        cap: Whether to use cross attention projectors; otherwise `ConvProjector` is used.
        spatial: Whether to use the spatial loss at both stages.
        frequency: Whether to use the frequency loss at both stages.
        tpp: Whether stage 3 passes the teacher's tail. Otherwise the outputs of its projectors have
            the grid and width of the final stage, and are compared (and used as queries) directly.
        kd: Whether to use the logit loss; otherwise the task loss has weight 1.
    """

    stage3: StageConfig = StageConfig()
    stage4: StageConfig = StageConfig()
    kd_alpha: _Share = 0.5
    temperature: _Positive = 1.0
    task: Literal["cross_entropy", "bce"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm: Literal["batch", "layer"] = "batch"
    self_query: bool = False
    cap: bool = True
    spatial: bool = True
    frequency: bool = True
    tpp: bool = True
    kd: bool = True

    @property
    def kd_weight(self) -> float:
        """Weight of the logit loss; 0 if it is switched off."""
        return self.kd_alpha if self.kd else 0.0

    @property
    def task_weight(self) -> float:
        """Weight of the task loss, ``1 - kd_weight``."""
        return 1.0 - self.kd_weight

    def stage(self, stage: Stage) -> StageConfig:
        """Return the settings of stage 3 or 4."""
        return self.stage3 if stage == 3 else self.stage4

    def feature_weight(self, stage: Stage, view: View) -> float:
        """Return the weight of one feature loss; 0 if it is switched off."""
        enabled = self.spatial if view == "spatial" else self.frequency
        return self.stage(stage).weight(view) if enabled else 0.0
