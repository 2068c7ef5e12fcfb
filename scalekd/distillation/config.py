"""The knobs of the distillation objectives, as JSON.

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
    """One stage's projectors and losses.

    Attributes:
        spatial_weight: Of the spatial loss; the published alpha's first entry. The loss is a sum
            over the teacher's tokens, and published pairs weigh a view alike: 0.08 for the 49 of
            Swin, 0.016 for the 256 of EVA.
        frequency_weight: Of the frequency loss; the second entry.
        num_heads: Of this stage's projectors; None takes heads about 64 wide.
        softmax_scale: Multiplies the attention scores: 5 in most published pairs. Two numbers
            are for the spatial and the frequency projector.
    """

    spatial_weight: _Weight = 0.08
    frequency_weight: _Weight = 0.06
    num_heads: Annotated[int, Field(ge=1)] | None = None
    softmax_scale: _Positive | tuple[_Positive, _Positive] = 5.0

    def weight(self, view: View) -> float:
        """The weight of one view's loss."""
        return self.spatial_weight if view == "spatial" else self.frequency_weight

    def scale(self, view: View) -> float:
        """The softmax scale of one view's projector."""
        if isinstance(self.softmax_scale, tuple):
            return self.softmax_scale[0 if view == "spatial" else 1]
        return self.softmax_scale


class ScaleKDConfig(_Frozen):
    """Everything that an objective needs to know beside shapes and the teacher's tail.

    Attributes:
        stage3: The student's penultimate level, compared after the teacher's tail.
        stage4: The student's final level.
        kd_alpha: Weight of the logit loss; the task loss gets the rest.
        temperature: Of the logit loss.
        task: The student's own loss, a name in `TASK_LOSSES`.
        label_smoothing: Of the task loss.
        norm: Norm in the projectors' stem.
        self_query: Stage-4 projectors learn their queries, instead of asking with stage 3's
            outputs. (The published code has a switch of this name that such outputs override.)
        cap: Cross attention projectors; off, `ConvProjector` stands in.
        spatial: The spatial view at both stages.
        frequency: The frequency view at both stages.
        tpp: Stage 3 passes the teacher's tail; off, its projectors answer on the final stage's
            grid and in its width, and are compared (and passed on as queries) directly.
        kd: The logit loss; off, the task loss keeps weight 1.
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
        """Weight of the logit loss once its switch is applied."""
        return self.kd_alpha if self.kd else 0.0

    @property
    def task_weight(self) -> float:
        """Weight of the task loss: what the logit loss leaves."""
        return 1.0 - self.kd_weight

    def stage(self, stage: Stage) -> StageConfig:
        """The settings of stage 3 or 4."""
        return self.stage3 if stage == 3 else self.stage4

    def feature_weight(self, stage: Stage, view: View) -> float:
        """Weight of one feature loss once the switches are applied."""
        enabled = self.spatial if view == "spatial" else self.frequency
        return self.stage(stage).weight(view) if enabled else 0.0
