"""The objectives that compare features: ScaleKD, and the same without labels and logits.

Put the objective and the student into one module, so that data parallelism wraps both.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from scalekd.distillation.config import SUMMARY_WEIGHT, ScaleKDConfig
from scalekd.distillation.feature_terms import FeatureTerms, StudentLevel, TeacherFeatures
from scalekd.distillation.form import LIGHT, PUBLISHED, Form
from scalekd.distillation.objective import Objective
from scalekd.distillation.targets import Targets
from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape


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

    If ``config.summary_weight`` is positive, a linear layer projects the student's pooled features,
    which are compared with the teacher's class token (the mean of its patch tokens, if it has
    none) as ``config.summary`` says.

    The tail is set to eval mode and its parameters to ``requires_grad=False``; gradients pass
    through it. It moves with the objective between devices and dtypes but is not a submodule:
    ``parameters()``, ``state_dict()``, ``train()`` and data parallelism do not see it, because it
    is restored from the teacher.

    Args:
        config: Weights, attention heads and switches.
        form: Size of the projectors; `PUBLISHED` if not given. If views share a projector, it has
            the softmax scale of the spatial view.
        student_levels: Shapes of the student's last two levels, stage 3 first.
        teacher_stages: Shapes of the teacher's stages 3 and 4; only patch tokens are compared.
        tail: Maps stage-3 patch tokens ``(batch, token, channel)`` to final patch tokens.
            Needed unless stage 3 is unused or ``config.tpp`` is off.
        student_features: Width of the student's pooled features; needed for the summary loss.
        name: Name of the teacher, where there are several.
        others: Further teachers by name. Their feature losses are added, each with projectors of
            its own, and every term has its teacher's name in front: ``dinov3_summary_loss``.

    Raises:
        UsageError: The tail is missing, a head count does not divide its stage's width, or
            every feature loss has weight 0.
    """

    needs_features = True
    _form: ClassVar = PUBLISHED
    _summary_weight: ClassVar = 0.0
    _reads_classifier: ClassVar = True

    def __init__(
        self,
        config: ScaleKDConfig | None = None,
        *,
        form: Form | None = None,
        student_levels: Sequence[StudentLevel],
        teacher_stages: Mapping[int, FeatureShape],
        tail: nn.Module | None = None,
        student_features: int | None = None,
        name: str = "base",
        others: Mapping[str, TeacherFeatures] = MappingProxyType({}),
    ) -> None:
        config = config or ScaleKDConfig()
        weights = (config.task_weight, config.kd_weight) if self._reads_classifier else (0.0, 0.0)
        super().__init__(config, task_weight=weights[0], kd_weight=weights[1])
        teachers = {name: TeacherFeatures(config, teacher_stages, tail), **others}
        # In a mapping, so that nn.Module does not register the tails.
        self._teachers: dict[str, FeatureTerms] = {}
        for each, teacher in teachers.items():
            stated = teacher.config.summary_weight
            self._teachers[each] = FeatureTerms(
                teacher.config,
                form=form or self._form,
                student_levels=student_levels,
                teacher_stages=teacher.stages,
                tail=teacher.tail,
                summary_weight=self._summary_weight if stated is None else stated,
                student_features=student_features,
            )
        self._first = name
        if not any(terms.names for terms in self._teachers.values()):
            raise UsageError(
                "every feature loss of the objective has weight 0 or is switched off; "
                "choose the objective 'kd' or 'none' instead"
            )
        self.projectors = self._teachers[name].projectors
        if others:  # a module's name has no dot, and none of ModuleDict's own names
            self.projectors = nn.ModuleDict(
                {
                    f"teacher_{each.replace('.', '%2E')}": terms.projectors
                    for each, terms in self._teachers.items()
                }
            )
        self.needs_pooled = any(terms.needs_pooled for terms in self._teachers.values())
        self.contrasts_images = any(terms.contrasts_images for terms in self._teachers.values())

    @property
    def tail(self) -> nn.Module | None:
        """The frozen tail of the first teacher; ``None`` if the objective uses none."""
        return self._teachers[self._first].tail

    def no_weight_decay(self) -> set[str]:
        """Return the names of the projectors' position embeddings (timm's convention)."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # So that .to(), .double() and .cuda() also move the tails.
        for terms in self._teachers.values():
            if terms.tail is not None:
                terms.tail._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _terms(self) -> tuple[str, ...]:
        named = [
            f"{self._prefix(teacher)}{name}"
            for teacher, terms in self._teachers.items()
            for name in terms.names
        ]
        return (*super()._terms(), *named)

    def _prefix(self, teacher: str) -> str:
        """Return the prefix of a teacher's terms; empty if there is only one teacher."""
        return f"{teacher}_" if len(self._teachers) > 1 else ""

    def _feature_losses(
        self, levels: Sequence[Tensor], pooled: Tensor | None, targets: Targets
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for teacher, terms in self._teachers.items():
            if not terms.names:
                continue
            own = targets if teacher == self._first else targets.others.get(teacher)
            if own is None:
                raise ValueError(f"the targets have no features of the teacher {teacher!r}")
            prefix = self._prefix(teacher)
            computed = terms.losses(levels, pooled, own)
            losses |= {f"{prefix}{name}": loss for name, loss in computed.items()}
        return losses


class FeaturesObjective(ScaleKDObjective):
    """The feature losses of `ScaleKDObjective` and the summary loss: no labels, no logits.

    The summary loss has the weight `SUMMARY_WEIGHT` unless ``config`` states another; ``form`` is
    `LIGHT` if not given. Settings of labels and logits are not read, and the student's classifier,
    if it has one, is not trained.
    """

    _form = LIGHT
    _summary_weight = SUMMARY_WEIGHT
    _reads_classifier = False
