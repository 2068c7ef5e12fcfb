"""Settings of the distillation objectives, which can be written as JSON.

The defaults are close to the recipe of most published pairs (ResNet-50, MobileNet, DeiT from
Swin-L), whose weights of 0.08 and 0.06 for 49 tokens follow from the defaults rounded.
Each part of the method can be switched off for an ablation without touching its weights.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scalekd.text import did_you_mean

ObjectiveName = Literal["scalekd", "scalekd-light", "features", "kd", "none"]
View = Literal["spatial", "frequency"]
Stage = Literal[3, 4]

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]

VIEW_WEIGHTS: dict[View, float] = {"spatial": 4.0, "frequency": 3.0}
"""Default weight of the loss of each view for a whole view, divided by the number of tokens.

The losses are sums over tokens. Published weights keep their total near 4 as well: 0.08 for 49
tokens, 0.016 for 256. A constant 0.08 gives losses of 110 at 196 tokens and 766 at the 1,369 of
DINOv2 at its own size, beside a task loss of 2 to 7.
"""

SUMMARY_WEIGHT = 4.0
"""Default weight of the summary loss of the objective ``features``."""

_NOT_OF_ONE_TEACHER = frozenset({"kd", "kd_alpha", "temperature", "task", "label_smoothing"})
"""Settings of the losses of the student's classifier, and so not of one teacher's features."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageConfig(_Frozen):
    """Settings of the projectors and losses of one stage.

    Attributes:
        spatial_weight: Weight of the spatial loss, the first entry of the published alpha. The loss
            is a sum over the teacher's tokens, so the published weights fall with their number:
            0.08 for the 49 of Swin, 0.016 for the 256 of EVA. ``None``: 4 / number of tokens.
        frequency_weight: Weight of the frequency loss, the second entry of the published alpha.
            ``None``: 3 / number of tokens.
        num_heads: Number of attention heads of this stage's projectors; ``None`` chooses heads
            about 64 wide.
        softmax_scale: Factor of the attention scores, 5 in most published pairs. A pair of numbers
            sets the spatial and the frequency projector separately.
    """

    spatial_weight: _Weight | None = None
    frequency_weight: _Weight | None = None
    num_heads: Annotated[int, Field(ge=1)] | None = None
    softmax_scale: _Positive | tuple[_Positive, _Positive] = 5.0

    def weight(self, view: View, num_tokens: int) -> float:
        """Return the weight of one view's loss against a teacher of ``num_tokens`` patch tokens."""
        weight = self.spatial_weight if view == "spatial" else self.frequency_weight
        return VIEW_WEIGHTS[view] / num_tokens if weight is None else weight

    def scale(self, view: View) -> float:
        """Return the softmax scale of one view's projector."""
        if isinstance(self.softmax_scale, tuple):
            return self.softmax_scale[0 if view == "spatial" else 1]
        return self.softmax_scale


class ScaleKDConfig(_Frozen):
    """All settings of an objective, except shapes and the teacher's tail.

    Attributes:
        weight: Factor of all feature losses; per teacher if there are several.
        stage3: Settings for the student's penultimate level, compared after the teacher's tail.
        stage4: Settings for the student's final level.
        summary_weight: Weight of the summary loss, which compares the student's pooled features
            with the teacher's class token. ``None``: `SUMMARY_WEIGHT` for the objective
            ``features``, 0 for the others, as published.
        summary: How the summary loss compares. ``"contrast"``: which of the batch's standardised
            class tokens belongs to an image, see `contrast_loss`; ``"standardised"``: the angle to
            the standardised class token; ``"direction"``: the angle to the class token itself,
            which a few large channels decide. *Standardised* means without the mean and divided by
            the standard deviation of the teacher's class tokens, channel by channel.
        summary_temperature: Temperature of ``"contrast"``.
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
        teachers: By name of a teacher, settings of its features that differ from the ones above. In
            a file or on a command line, ``dinov3.weight`` is short for ``teachers.dinov3.weight``.
    """

    weight: _Weight = 1.0
    stage3: StageConfig = StageConfig()
    stage4: StageConfig = StageConfig()
    summary_weight: _Weight | None = None
    summary: Literal["contrast", "standardised", "direction"] = "contrast"
    summary_temperature: _Positive = 0.1
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
    teachers: dict[str, dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _by_teacher(cls, values: Any) -> Any:
        """Take the settings below an unknown name as those of the teacher of that name."""
        if not isinstance(values, Mapping):
            return values
        named = {
            name: dict(value)
            for name, value in values.items()
            if name not in cls.model_fields and isinstance(value, Mapping)
        }
        if not named:
            return values
        rest = {name: value for name, value in values.items() if name not in named}
        return {**rest, "teachers": {**rest.get("teachers", {}), **named}}

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        for name in self.teachers:
            try:
                self.for_teacher(name)
            except ValidationError as error:
                first = error.errors()[0]
                setting = ".".join(map(str, first["loc"]))
                known = type(self).model_fields
                hint = "" if setting in known else did_you_mean(setting, known)
                raise ValueError(f"{name}.{setting}: {first['msg']}{hint}") from None
        return self

    def for_teacher(self, name: str) -> "ScaleKDConfig":
        """Return the settings for one of several teachers: these, and its own ones over them.

        Raises:
            ValueError: It has a setting that is unknown, or not of one teacher.
        """
        own = self.teachers.get(name, {})
        shared = sorted(_NOT_OF_ONE_TEACHER & own.keys())
        if shared:
            raise ValueError(
                f"{name}.{shared[0]}: is no setting of one teacher; give {shared[0]} alone"
            )
        merged = self.model_dump(exclude={"teachers"}, exclude_unset=True)
        for key, value in own.items():
            nested = isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping)
            merged[key] = {**merged.get(key, {}), **value} if nested else value
        return ScaleKDConfig.model_validate(merged)

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

    def feature_weight(self, stage: Stage, view: View, num_tokens: int) -> float:
        """Return the weight of one feature loss; 0 if it is switched off.

        Args:
            stage: Stage of the student.
            view: View of the loss.
            num_tokens: Patch tokens of the teacher's final stage, which decides the default.
        """
        enabled = self.spatial if view == "spatial" else self.frequency
        return self.weight * self.stage(stage).weight(view, num_tokens) if enabled else 0.0
