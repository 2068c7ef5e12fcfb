"""ScaleKD's projectors, losses and objectives, for any training loop."""

from typing import TYPE_CHECKING

from scalekd._lazy import lazy

if TYPE_CHECKING:
    from scalekd.distillation.config import ObjectiveName, ScaleKDConfig, StageConfig
    from scalekd.distillation.decoding import JoinedTargets, TargetDecoder
    from scalekd.distillation.factory import FORMS, build_objective
    from scalekd.distillation.feature_objective import FeaturesObjective, ScaleKDObjective
    from scalekd.distillation.feature_terms import FeatureTerms, StudentLevel, TeacherFeatures
    from scalekd.distillation.form import LIGHT, PUBLISHED, Form
    from scalekd.distillation.losses import (
        TASK_LOSSES,
        UNLABELLED,
        bce_loss,
        contrast_loss,
        cross_entropy_loss,
        frequency_loss,
        kd_loss,
        spatial_loss,
        summary_loss,
        topk_kd_loss,
    )
    from scalekd.distillation.objective import KDObjective, Objective, PlainObjective
    from scalekd.distillation.projector import (
        ConvProjector,
        CrossAttentionProjector,
        default_num_heads,
    )
    from scalekd.distillation.targets import (
        FullLogits,
        LogitTargets,
        MeanLogits,
        SelectedClasses,
        Targets,
        TopKLogits,
        select_classes,
    )

__all__ = [
    "FORMS",
    "LIGHT",
    "PUBLISHED",
    "TASK_LOSSES",
    "UNLABELLED",
    "ConvProjector",
    "CrossAttentionProjector",
    "FeatureTerms",
    "FeaturesObjective",
    "Form",
    "FullLogits",
    "JoinedTargets",
    "KDObjective",
    "LogitTargets",
    "MeanLogits",
    "Objective",
    "ObjectiveName",
    "PlainObjective",
    "ScaleKDConfig",
    "ScaleKDObjective",
    "SelectedClasses",
    "StageConfig",
    "StudentLevel",
    "TargetDecoder",
    "Targets",
    "TeacherFeatures",
    "TopKLogits",
    "bce_loss",
    "build_objective",
    "contrast_loss",
    "cross_entropy_loss",
    "default_num_heads",
    "frequency_loss",
    "kd_loss",
    "select_classes",
    "spatial_loss",
    "summary_loss",
    "topk_kd_loss",
]

__getattr__ = lazy(__name__, __file__)
