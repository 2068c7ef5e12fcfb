"""One step from a cache of every family of teachers, with and without a head, on other grids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.distillation import ScaleKDConfig
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig
from scalekd.training import CachedTeacher

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
SWIN = {"embed_dim": 12, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 2, 4]}
CASES = {  # model, arguments, pixels of the views and of the student, tokens of stage 4
    "swinv2": ("swinv2_tiny_window8_256", {**SWIN, "window_size": 4}, 128, 96, 16),
    "eva02": ("eva02_base_patch14_448", VIT, 56, 64, 16),
    "deit3": ("deit3_small_patch16_224", VIT, 80, 80, 25),
    "beitv2": ("beitv2_base_patch16_224", VIT, 112, 64, 49),
    "dinov2-features-only": ("vit_small_patch14_dinov2", VIT, 70, 96, 25),
    "dinov3-features-only": ("vit_small_patch16_dinov3", VIT, 64, 128, 16),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("student", ["test_resnet", "test_vit"])
def test_a_step_moves_student_and_projectors(
    name: str, student: str, make_cache: Callable[..., Any], tiny_images: Path, tmp_path: Path
) -> None:
    model, arguments, view_size, img_size, num_tokens = CASES[name]
    headless = name.endswith("features-only")
    make_cache(
        tmp_path / "cache",
        teacher=TeacherConfig(
            model=model,
            pretrained=False,
            img_size=view_size,
            model_kwargs={**arguments, "num_classes": 0 if headless else 10},
        ),
        logits="none" if headless else "full",
        limit=8,
        passes=1,
    )
    teacher = CachedTeacher(tmp_path / "cache", data_dir=tiny_images)
    assert teacher.num_classes == 10  # of the images, where the teacher names none
    learner = create_student(student, num_classes=10, img_size=img_size)
    module = teacher.module(learner, config=ScaleKDConfig(kd=not headless))
    targets = teacher.targets(module.objective)
    batch = next(iter(teacher.loader(learner, targets, batch_size=8)))
    assert batch["pixels"].shape == (8, 3, img_size, img_size)
    said = targets(batch)
    assert said.features is not None
    assert said.features.shape[1] == num_tokens
    losses, _ = module(batch["pixels"], batch["label"], said)
    losses["total"].backward()
    assert ("kd_loss" in losses) != headless
    assert all(torch.isfinite(loss) for loss in losses.values())
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    for projector in module.objective.projectors.values():
        assert all(parameter.grad.any() for parameter in projector.parameters())
