"""The losses that compare a student's features with those of one teacher.

Projectors of the student's last two levels, the teacher's frozen tail, and the summary term. An
objective adds up the terms of one or more teachers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalekd.distillation.config import ScaleKDConfig, Stage, View
from scalekd.distillation.form import Form
from scalekd.distillation.losses import contrast_loss, summary_loss, target_view, view_loss
from scalekd.distillation.projector import (
    ConvProjector,
    CrossAttentionProjector,
    Grid,
    default_num_heads,
)
from scalekd.distillation.summary import SummaryProjector
from scalekd.distillation.targets import Targets
from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape

StudentLevel = FeatureShape | tuple[int, Grid]
"""One level of the student: its shape, or a pair of its channels and its grid."""

_VIEWS: tuple[View, ...] = ("spatial", "frequency")
_SUMMARY = "summary"


class TeacherFeatures(NamedTuple):
    """A further teacher of an objective; see `FeatureTerms`.

    Attributes:
        config: Settings of its losses.
        stages: Shapes of its stages.
        tail: Its frozen tail, if stage 3 passes through it.
    """

    config: ScaleKDConfig
    stages: Mapping[int, FeatureShape]
    tail: nn.Module | None = None


class FeatureTerms:
    """Weighted feature losses against one teacher; see `ScaleKDObjective`.

    This is no module: the objective registers `projectors`, and keeps the frozen tail out of
    parameters and checkpoints.

    Args:
        config: Weights, attention heads and switches.
        form: Size of the projectors.
        student_levels: Shapes of the student's last two levels, stage 3 first.
        teacher_stages: Shapes of the teacher's stages 3 and 4; only patch tokens are compared.
        tail: Maps stage-3 patch tokens to final patch tokens; see `ScaleKDObjective`.
        summary_weight: Weight of the summary loss.
        student_features: Width of the student's pooled features; needed for the summary loss.

    Attributes:
        projectors: By name: ``stage3_spatial`` and so on, and ``summary``.
        tail: The frozen tail in eval mode; ``None`` if the terms use none.
        names: Names of the losses in their order; empty if every weight is 0.
        needs_pooled: Whether the student's pooled features are read.
        contrasts_images: Whether a loss compares the images of a batch, so that it needs two.

    Raises:
        UsageError: The tail or a shape is missing, or a head count does not divide its stage's
            width.
    """

    def __init__(
        self,
        config: ScaleKDConfig,
        *,
        form: Form,
        student_levels: Sequence[StudentLevel],
        teacher_stages: Mapping[int, FeatureShape],
        tail: nn.Module | None,
        summary_weight: float,
        student_features: int | None,
    ) -> None:
        if 4 not in teacher_stages or len(student_levels) != 2:
            raise UsageError(
                "feature losses need the student's last two levels and the shape of the teacher's "
                f"stage 4, but got {len(student_levels)} levels and stages {sorted(teacher_stages)}"
            )
        self._config = config
        self._final = teacher_stages[4]
        # Name of the projector of each view: its own, or one for both.
        self._branch = {view: "shared" if form.shared_views else view for view in _VIEWS}
        self._stage4 = self._branches(4)
        querying = self._stage4 if config.cap and not config.self_query else []
        self._stage3 = list(dict.fromkeys([*self._branches(3), *querying]))
        self._querying = frozenset(querying)
        self._summary_weight = config.weight * summary_weight
        self.needs_pooled = self._summary_weight > 0
        self.contrasts_images = self.needs_pooled and config.summary == "contrast"
        summary = (f"{_SUMMARY}_loss",) if self.needs_pooled else ()
        self.names = (*(name for name, _, _ in self._compared()), *summary)

        through_tail = config.tpp and bool(self._stage3)
        if through_tail and 3 not in teacher_stages:
            raise UsageError(
                "teacher parameter perception needs the shapes of the teacher's stages [3, 4], but "
                f"got stages {sorted(teacher_stages)}; pass both, or set tpp=False"
            )
        if through_tail and tail is None:
            raise UsageError(
                "the feature losses send stage 3 through the teacher's tail, but none was "
                "given; pass the tail of the teacher that made the targets, or set tpp=False"
            )
        self.tail = tail.eval().requires_grad_(False) if through_tail and tail is not None else None
        stage3_shape = teacher_stages[3] if through_tail else self._final
        projectors: dict[str, nn.Module] = {}
        for branch in self._stage3:
            projectors[f"stage3_{branch}"] = _build_projector(
                config, form, 3, branch, student_levels[0], stage3_shape, learned_query=True
            )
        for branch in self._stage4:
            learned = branch not in querying
            projectors[f"stage4_{branch}"] = _build_projector(
                config, form, 4, branch, student_levels[1], self._final, learned_query=learned
            )
        if self.needs_pooled:
            if student_features is None:
                raise UsageError(
                    "the summary loss needs the width of the student's pooled features; pass"
                    " student_features, or set summary_weight=0"
                )
            projectors[_SUMMARY] = SummaryProjector(
                student_features,
                self._final.num_channels,
                standardised=config.summary != "direction",
            )
        self.projectors = nn.ModuleDict(projectors)

    def losses(
        self, levels: Sequence[Tensor], pooled: Tensor | None, targets: Targets
    ) -> dict[str, Tensor]:
        """Compute the weighted losses of a batch by name, in the order of `names`."""
        features = self._target_features(targets)
        losses: dict[str, Tensor] = {}
        predicted = self._predict(levels)
        views = {
            view: target_view(features, view)
            for view in dict.fromkeys(view for _, _, view in self._compared())
        }
        for name, stage, view in self._compared():
            loss = view_loss(predicted[stage, self._branch[view]], views[view], view)
            losses[name] = self._weight(stage, view) * loss
        if self.needs_pooled:
            if pooled is None:
                raise ValueError(
                    "the summary loss needs the student's pooled features; pass pooled, or set"
                    " summary_weight=0"
                )
            loss = self._summary(pooled, targets)
            losses[f"{_SUMMARY}_loss"] = self._summary_weight * loss
        return losses

    def _summary(self, pooled: Tensor, targets: Targets) -> Tensor:
        """Compare the student's pooled features with the teacher's summaries."""
        projector = self.projectors[_SUMMARY]
        parts = [part for part in (targets.summary, targets.elsewhere) if part is not None]
        predicted, target = projector(pooled), projector.standardise(torch.cat(parts))  # type: ignore[operator]
        if self.contrasts_images:
            temperature = self._config.summary_temperature
            return contrast_loss(predicted, target, temperature=temperature)
        return summary_loss(predicted, target[: len(predicted)])

    def _weight(self, stage: Stage, view: View) -> float:
        return self._config.feature_weight(stage, view, self._final.num_patch_tokens)

    def _branches(self, stage: Stage) -> list[str]:
        """Return the names of the projectors that a stage's losses need."""
        views = (view for view in _VIEWS if self._weight(stage, view) > 0)
        return list(dict.fromkeys(self._branch[view] for view in views))

    def _compared(self) -> Iterator[tuple[str, Stage, View]]:
        stages: tuple[Stage, Stage] = (3, 4)
        for stage in stages:
            for view in _VIEWS:
                if self._weight(stage, view) > 0:
                    yield f"stage{stage}_{view}_loss", stage, view

    def _predict(self, levels: Sequence[Tensor]) -> dict[tuple[Stage, str], Tensor]:
        """Predict final-stage tokens from the student's levels, by stage and branch."""
        if len(levels) != 2:
            raise ValueError(
                f"the feature losses take the student's last two levels, not {len(levels)}"
            )
        predicted: dict[tuple[Stage, str], Tensor] = {}
        if self._stage3:
            projected = [self.projectors[f"stage3_{name}"](levels[0]) for name in self._stage3]
            for name, tokens in zip(self._stage3, self._through_tail(projected), strict=True):
                predicted[3, name] = tokens
        for name in self._stage4:
            query = (predicted[3, name],) if name in self._querying else ()
            predicted[4, name] = self.projectors[f"stage4_{name}"](levels[1], *query)
        return predicted

    def _through_tail(self, projected: list[Tensor]) -> Sequence[Tensor]:
        tail = self.tail
        if tail is None:
            return projected
        tokens = torch.cat(projected)  # both views in one pass
        final: Tensor = tail(tokens)
        expected = (len(tokens), self._final.num_patch_tokens, self._final.num_channels)
        if final.shape != expected:
            raise ValueError(
                f"the tail returned {tuple(final.shape)} for {tuple(tokens.shape)}, where the "
                f"teacher's final stage is {expected}; it is not the tail of this teacher, or "
                "was built for another image size"
            )
        return final.chunk(len(projected))

    def _target_features(self, targets: Targets) -> Tensor:
        expected = (self._final.num_patch_tokens, self._final.num_channels)
        if targets.features is None:
            raise ValueError(
                "the feature losses compare final-stage features and the targets have none; "
                "read stage 4 from the cache, or choose the objective 'kd' or 'none'"
            )
        if targets.features.shape[1:] != expected:
            rows, columns = self._final.grid
            raise ValueError(
                f"{tuple(targets.features.shape) = }, but the teacher's final stage has "
                f"{expected[0]} patch tokens ({rows} x {columns}) of {expected[1]} channels; "
                "prefix tokens must be dropped, and the teacher must be the one that the "
                "objective was built for"
            )
        return targets.features


def _build_projector(
    config: ScaleKDConfig,
    form: Form,
    stage: Stage,
    branch: str,
    level: StudentLevel,
    shape: FeatureShape,
    *,
    learned_query: bool,
) -> nn.Module:
    student = level if isinstance(level, FeatureShape) else FeatureShape(level[1], level[0])
    arguments: dict[str, Any] = {
        "student_channels": student.num_channels,
        "student_grid": student.grid,
        "teacher_channels": shape.num_channels,
        "query_grid": shape.grid,
        "norm": config.norm,
        "depthwise_stem": form.depthwise_stem,
    }
    if not config.cap:
        return ConvProjector(**arguments)
    settings = config.stage(stage)
    return CrossAttentionProjector(
        **arguments,
        num_heads=settings.num_heads or default_num_heads(shape.num_channels),
        softmax_scale=settings.scale("frequency" if branch == "frequency" else "spatial"),
        ffn_ratio=form.ffn_ratio,
        learned_query=learned_query,
    )
