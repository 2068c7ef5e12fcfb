"""ScaleKD in a plain PyTorch loop, with a live teacher: the lines that the README shows."""

import torch
from torch import Tensor

from scalekd.distillation import FullLogits, ScaleKDConfig, ScaleKDObjective, Targets
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig, load_teacher


def test_a_few_steps_of_ones_own_loop_bring_the_student_closer() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    loader: list[tuple[Tensor, Tensor]] = [(images, torch.tensor([0, 3, 1, 2]))] * 8

    swin = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "num_classes": 10}
    teacher = load_teacher(
        TeacherConfig(
            model="swin_tiny_patch4_window7_224",
            pretrained=False,
            img_size=(64, 64),
            model_kwargs={**swin, "window_size": 2},
        )
    )
    student = create_student("resnet18", num_classes=10, img_size=64)

    objective = ScaleKDObjective(
        ScaleKDConfig(),
        student_levels=student.spec.levels,
        teacher_stages=teacher.spec.stages,
        tail=teacher.tail(),
    )
    parameters = [*student.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    history = []
    for pixels, labels in loader:
        with torch.no_grad():
            said = teacher(pixels)
        output = student(pixels / 127.5 - 1)
        targets = Targets(said.features[4], FullLogits(said.logits))
        losses = objective(output.levels, output.logits, labels, targets)
        losses["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: value.item() for name, value in losses.items()})

    # A random teacher contradicts the labels, so that the logit loss may well rise.
    falling = ["total", *(name for name in objective.loss_names if name.startswith("stage"))]
    assert all(history[-1][name] < history[0][name] for name in falling), history
