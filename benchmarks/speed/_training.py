"""One training step of a student, from stored targets or from the live teacher."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalekd.distillation import Objective, ScaleKDObjective
from scalekd.students import Student, create_student
from scalekd.teachers import Teacher
from scalekd.training import DistillationModule, OnlineTargets
from scalekd.training.config import TrainConfig
from scalekd.training.optim import build_optimizer


@dataclass(frozen=True)
class Steps:
    """Calls that make one step each, over the same batch.

    Attributes:
        cached: Decodes stored targets, then forward, backward, update; returns the loss.
        online: Runs the teacher, then the same.
        teacher: Runs the teacher and nothing else.
    """

    cached: Callable[[], Tensor]
    online: Callable[[], Tensor]
    teacher: Callable[[], object]


def make_steps(
    model: str,
    *,
    img_size: int,
    teacher: Teacher,
    decoder: nn.Module,
    batch: dict[str, Tensor],
    update: bool = True,
) -> Steps:
    """Build the student, its objective and optimiser, and the steps.

    Args:
        model: Student's name; its weights are random.
        img_size: Its image size.
        teacher: Live teacher.
        decoder: From the planes in ``batch`` to targets.
        batch: ``pixels``, ``teacher_pixels``, ``label`` and the decoder's planes.
        update: End each step with the optimiser's.
    """
    torch.manual_seed(0)
    student: Student = create_student(
        model, num_classes=teacher.spec.num_classes or 10, img_size=img_size
    )
    objective: Objective = ScaleKDObjective(
        student_levels=student.spec.levels, teacher_stages=teacher.spec.stages, tail=_tail(teacher)
    )
    module = DistillationModule(student, objective, mean=student.spec.mean, std=student.spec.std)
    module.train()
    config = TrainConfig.from_mapping({"model": model, "output": ""}, source="the benchmark")
    optimizer = build_optimizer(config, student.model, objective)
    live = OnlineTargets(teacher)

    def step(source: nn.Module) -> Tensor:
        with torch.no_grad():
            targets = source(batch)
        loss: Tensor = module(batch["pixels"], batch["label"], targets).losses["total"]
        loss.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Steps(lambda: step(decoder), lambda: step(live), lambda: live(batch))


def _tail(teacher: Teacher) -> nn.Module:
    if teacher.spec.stages[3].num_prefix_tokens and teacher.prefix_tokens is None:
        pixels = torch.zeros(2, 3, *teacher.spec.img_size, dtype=torch.uint8)
        teacher.calibrate_prefix([teacher(pixels).features[3]])
    return teacher.tail()
