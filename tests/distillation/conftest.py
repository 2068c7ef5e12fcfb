"""A small student and teacher for the objectives: grids that differ, one of them not square."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalekd.distillation import (
    PUBLISHED,
    Form,
    FullLogits,
    ScaleKDConfig,
    ScaleKDObjective,
    StageConfig,
    Targets,
)
from scalekd.shapes import FeatureShape

BATCH, NUM_CLASSES = 3, 5


class ToyTail(nn.Module):
    """Halves a 6 x 4 grid, doubles the width; its dropout would show were it ever in training."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(4 * 8, 16)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("scale", torch.ones(16))
        self.batches: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.batches.append(len(tokens))
        cells = tokens.reshape(-1, 3, 2, 2, 2, 8).transpose(2, 3).reshape(-1, 6, 32)
        return self.norm(self.dropout(self.merge(cells).tanh())) * self.scale


class Toys:
    """Everything that an objective is built from and called with, the same at every use."""

    student_levels = ((6, (5, 5)), (7, (3, 2)))
    teacher_stages = {3: FeatureShape((6, 4), 8, 1), 4: FeatureShape((3, 2), 16, 1)}

    def objective(
        self, *, tail: nn.Module | None = None, form: Form = PUBLISHED, **settings: Any
    ) -> ScaleKDObjective:
        torch.manual_seed(0)
        published = {"spatial_weight": 0.08, "frequency_weight": 0.06}
        heads = {
            "stage3": StageConfig(num_heads=2, **published),
            "stage4": StageConfig(num_heads=4, **published),
        }
        return ScaleKDObjective(
            ScaleKDConfig(**{**heads, **settings}),
            form=form,
            student_levels=self.student_levels,
            teacher_stages=self.teacher_stages,
            tail=tail or ToyTail(),
        )

    def batch(self) -> tuple[list[Tensor], Tensor, Tensor, Targets]:
        torch.manual_seed(1)
        levels = [
            torch.randn(BATCH, channels, *grid, requires_grad=True)
            for channels, grid in self.student_levels
        ]
        logits = torch.randn(BATCH, NUM_CLASSES, requires_grad=True)
        targets = Targets(
            features=torch.randn(BATCH, 6, 16),
            logits=FullLogits(torch.randn(BATCH, NUM_CLASSES)),
        )
        return levels, logits, torch.arange(BATCH), targets


@pytest.fixture
def toys() -> Toys:
    return Toys()


@pytest.fixture
def make_tail() -> Callable[[], ToyTail]:
    return ToyTail


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
