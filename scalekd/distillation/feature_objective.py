"""The ScaleKD objective: projectors, the teacher's tail, and their losses.

Put it and the student into one module, so that data parallelism wraps both.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from scalekd.distillation.config import ScaleKDConfig, Stage, View
from scalekd.distillation.form import PUBLISHED, Form
from scalekd.distillation.losses import target_view, view_loss
from scalekd.distillation.objective import Objective, weighted_kd_loss
from scalekd.distillation.projector import (
    ConvProjector,
    CrossAttentionProjector,
    Grid,
    default_num_heads,
)
from scalekd.distillation.targets import Targets
from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape

StudentLevel = FeatureShape | tuple[int, Grid]
"""One level of the student: its shape, or a pair of its channels and its grid."""

_VIEWS: tuple[View, ...] = ("spatial", "frequency")


class ScaleKDObjective(Objective):
    """Task loss, logit loss and the four feature losses of ScaleKD (arXiv 2411.06786).

    For each view (spatial, frequency): the student's stage-3 map is projected onto the
    teacher's stage-3 tokens, passes the teacher's frozen tail, and is compared with the
    teacher's final features. The output of the tail, not detached, is the query of a second
    projector of the student's stage-4 map, whose output is compared with the same features.
    Both views pass the tail in one batch.

    A view or stage of weight 0 builds no module, computes nothing and returns no term. The one
    exception: a stage-3 projector (and tail) whose own loss has weight 0 is still built where
    the stage-4 projector of its view takes its queries from it.

    The tail is set to eval mode and its parameters to ``requires_grad=False``; gradients pass
    through it. It moves with the objective between devices and dtypes but is not a submodule:
    ``parameters()``, ``state_dict()``, ``train()`` and data parallelism do not see it, because it
    is restored from the teacher.

    Args:
        config: Weights, attention heads and switches.
        form: Size of the projectors: `PUBLISHED` or `LIGHT`. If views share a projector, it has the
            softmax scale of the spatial view.
        student_levels: Shapes of the student's last two levels, stage 3 first.
        teacher_stages: Shapes of the teacher's stages 3 and 4; only patch tokens are compared.
        tail: Maps stage-3 patch tokens ``(batch, token, channel)`` to final patch tokens.
            Needed unless stage 3 is unused or ``config.tpp`` is off.

    Raises:
        UsageError: The tail is missing, a head count does not divide its stage's width, or
            every feature loss has weight 0.
    """

    def __init__(
        self,
        config: ScaleKDConfig | None = None,
        *,
        form: Form = PUBLISHED,
        student_levels: Sequence[StudentLevel],
        teacher_stages: Mapping[int, FeatureShape],
        tail: nn.Module | None = None,
    ) -> None:
        config = config or ScaleKDConfig()
        super().__init__(config, task_weight=config.task_weight)
        # Name of the projector of each view: its own, or one for both.
        self._branch = {view: "shared" if form.shared_views else view for view in _VIEWS}
        self._stage4 = self._branches(4)
        querying = self._stage4 if config.cap and not config.self_query else []
        self._stage3 = list(dict.fromkeys([*self._branches(3), *querying]))
        self._querying = frozenset(querying)
        if not self._stage3 and not self._stage4:
            raise UsageError(
                "every feature loss of the scalekd objective has weight 0 or is switched off; "
                "choose the objective 'kd' or 'none' instead"
            )
        self.needs_features = True
        self.needs_logits = config.kd_weight > 0

        through_tail = config.tpp and bool(self._stage3)
        needed = {3, 4} if through_tail else {4}
        if len(student_levels) != 2 or not needed <= set(teacher_stages):
            raise UsageError(
                f"the scalekd objective needs the student's last two levels and the shapes of the "
                f"teacher's stages {sorted(needed)}, but got {len(student_levels)} levels and "
                f"stages {sorted(teacher_stages)}"
            )
        if through_tail and tail is None:
            raise UsageError(
                "the scalekd objective sends stage 3 through the teacher's tail, but none was "
                "given; pass the tail of the teacher that made the targets, or set tpp=False"
            )
        self._final = teacher_stages[4]
        stage3_shape = teacher_stages[3] if through_tail else self._final
        projectors: dict[str, nn.Module] = {}
        for branch in self._stage3:
            projectors[f"stage3_{branch}"] = _build_projector(
                config, form, 3, branch, student_levels[0], stage3_shape, learned_query=True
            )
        for branch in self._stage4:
            projectors[f"stage4_{branch}"] = _build_projector(
                config,
                form,
                4,
                branch,
                student_levels[1],
                self._final,
                learned_query=branch not in querying,
            )
        self.projectors = nn.ModuleDict(projectors)

        # In a tuple, so that nn.Module does not register it; see the class docstring.
        self._tail_holder: tuple[nn.Module, ...] = ()
        if through_tail and tail is not None:
            self._tail_holder = (tail.eval().requires_grad_(False),)

    @property
    def tail(self) -> nn.Module | None:
        """The frozen tail; ``None`` if the objective uses none."""
        return self._tail_holder[0] if self._tail_holder else None

    def no_weight_decay(self) -> set[str]:
        """Return the names of the projectors' position embeddings (timm's convention)."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self.tail is not None:  # so that .to(), .double() and .cuda() also move the tail
            self.tail._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _terms(self) -> tuple[str, ...]:
        kd = ("kd_loss",) if self.needs_logits else ()
        return (*super()._terms(), *kd, *(name for name, _, _ in self._feature_terms()))

    def _branches(self, stage: Stage) -> list[str]:
        """Return the names of the projectors that a stage's losses need."""
        views = (view for view in _VIEWS if self.config.feature_weight(stage, view) > 0)
        return list(dict.fromkeys(self._branch[view] for view in views))

    def _feature_terms(self) -> Iterator[tuple[str, Stage, View]]:
        stages: tuple[Stage, Stage] = (3, 4)
        for stage in stages:
            for view in _VIEWS:
                if self.config.feature_weight(stage, view) > 0:
                    yield f"stage{stage}_{view}_loss", stage, view

    def _losses(
        self, levels: Sequence[Tensor], logits: Tensor, labels: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        losses = super()._losses(levels, logits, labels, targets)
        if self.needs_logits:
            losses["kd_loss"] = weighted_kd_loss(self.config, logits, targets)
        features = self._target_features(targets)
        predicted = self._predict(levels)
        compared = {
            view: target_view(features, view)
            for view in dict.fromkeys(view for _, _, view in self._feature_terms())
        }
        for name, stage, view in self._feature_terms():
            loss = view_loss(predicted[stage, self._branch[view]], compared[view], view)
            losses[name] = self.config.feature_weight(stage, view) * loss
        return losses

    def _predict(self, levels: Sequence[Tensor]) -> dict[tuple[Stage, str], Tensor]:
        """Predict final-stage tokens from the student's levels, by stage and branch."""
        if len(levels) != 2:
            raise ValueError(
                f"the scalekd objective takes the student's last two levels, not {len(levels)}"
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
                "the scalekd objective compares final-stage features and the targets have none; "
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
    if not config.cap:
        return ConvProjector(
            student_channels=student.num_channels,
            student_grid=student.grid,
            teacher_channels=shape.num_channels,
            query_grid=shape.grid,
            norm=config.norm,
            depthwise_stem=form.depthwise_stem,
        )
    settings = config.stage(stage)
    return CrossAttentionProjector(
        student_channels=student.num_channels,
        student_grid=student.grid,
        teacher_channels=shape.num_channels,
        query_grid=shape.grid,
        num_heads=settings.num_heads or default_num_heads(shape.num_channels),
        softmax_scale=settings.scale("frequency" if branch == "frequency" else "spatial"),
        norm=config.norm,
        depthwise_stem=form.depthwise_stem,
        ffn_ratio=form.ffn_ratio,
        learned_query=learned_query,
    )
