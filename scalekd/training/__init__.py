"""Training: one module for student and projectors, the loop, checkpoints and logs."""

from typing import TYPE_CHECKING

from scalekd._lazy import lazy

if TYPE_CHECKING:
    from scalekd.distributed import Coordinator
    from scalekd.errors import TrainingDiverged, TrainingInterrupted
    from scalekd.training.cached_teacher import CachedTeacher
    from scalekd.training.checkpoint import (
        Checkpoint,
        Position,
        find_checkpoint,
        find_run_checkpoint,
        read_checkpoint,
    )
    from scalekd.training.config import TrainConfig
    from scalekd.training.interfaces import EpochLoader, TrainResult
    from scalekd.training.labelled_images import LabelledImages
    from scalekd.training.module import (
        DistillationModule,
        StepOutput,
        freeze_parameters,
        is_convolutional,
        synchronise_batch_norm,
    )
    from scalekd.training.optim import (
        build_optimizer,
        build_scheduler,
        parameter_groups,
        planned_epochs,
    )
    from scalekd.training.targets import NoTargets, OnlineTargets
    from scalekd.training.trained import TrainedStudent, load_trained_student, student_facts
    from scalekd.training.trainer import Trainer

__all__ = [
    "CachedTeacher",
    "Checkpoint",
    "Coordinator",
    "DistillationModule",
    "EpochLoader",
    "LabelledImages",
    "NoTargets",
    "OnlineTargets",
    "Position",
    "StepOutput",
    "TrainConfig",
    "TrainResult",
    "TrainedStudent",
    "Trainer",
    "TrainingDiverged",
    "TrainingInterrupted",
    "build_optimizer",
    "build_scheduler",
    "find_checkpoint",
    "find_run_checkpoint",
    "freeze_parameters",
    "is_convolutional",
    "load_trained_student",
    "parameter_groups",
    "planned_epochs",
    "read_checkpoint",
    "student_facts",
    "synchronise_batch_norm",
]

__getattr__ = lazy(__name__, __file__)
