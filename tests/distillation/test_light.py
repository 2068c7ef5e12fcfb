"""What the light form may cost, counted in FLOPs on the meta device: nothing is computed."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from scalekd.distillation import (
    LIGHT,
    PUBLISHED,
    Form,
    FullLogits,
    Objective,
    PlainObjective,
    ScaleKDObjective,
    Targets,
)
from scalekd.students import create_student
from scalekd.teachers.tail import Tail, TailConfig

_SWIN_L = TailConfig(
    architecture="swin_large_patch4_window7_224",
    family="swin",
    img_size=(224, 224),
    num_classes=1000,
    global_pool="avg",
)


def _conv_backward(
    grad_shape: Any,
    x_shape: Any,
    weight_shape: Any,
    *others: Any,
    out_shape: Any = None,
) -> int:
    # torch's own formula counts every group of a depthwise convolution as a dense one.
    transposed, output_mask = others[4], others[7]
    forward: int = conv_flop_count(x_shape, weight_shape, grad_shape, transposed=transposed)
    return forward * sum(output_mask[:2])


def _step_flops(student: str, form: Form | None) -> int:
    """Forward and backward of one image at 224 px, taught by Swin-L or by nobody."""
    model = create_student(student, num_classes=1000, img_size=224).to("meta")
    with torch.device("meta"):
        tail = Tail.on_meta(_SWIN_L)
        objective: Objective = PlainObjective()
        if form is not None:
            objective = ScaleKDObjective(
                form=form, student_levels=model.spec.levels, teacher_stages=tail.stages, tail=tail
            )
        objective.to("meta")
        pixels, labels = torch.randn(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64)
        targets = Targets(torch.randn(1, 49, 1536), FullLogits(torch.randn(1, 1000)))
        counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward}
        )
        with counter:
            output = model(pixels)
            objective(output.levels, output.logits, labels, targets)["total"].backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("student", ["resnet50", "vit_small_patch16_224"])
def test_a_light_step_costs_at_most_two_plain_ones(student: str) -> None:
    plain = _step_flops(student, None)
    assert 1.2 * plain < _step_flops(student, LIGHT) <= 2 * plain
    assert _step_flops(student, PUBLISHED) > 3 * plain


def test_the_light_form_keeps_losses_and_targets(toys: Any) -> None:
    light, published = (toys.objective(form=form) for form in (LIGHT, PUBLISHED))
    levels, logits, labels, targets = toys.batch()
    losses = light(levels, logits, labels, targets)
    assert light.loss_names == published.loss_names
    assert losses["task_loss"] == published(*toys.batch())["task_loss"]
    for term in ("stage3_spatial_loss", "stage3_frequency_loss", "stage4_frequency_loss"):
        gradients = torch.autograd.grad(losses[term], levels, retain_graph=True, allow_unused=True)
        reached = [g is not None and bool(g.abs().sum() > 0) for g in gradients]
        assert reached == [True, term.startswith("stage4")]


def test_a_light_projector_is_small(toys: Any) -> None:
    shared = toys.objective(form=LIGHT).projectors["stage4_shared"]
    assert shared.stem.conv.weight.shape == (7, 1, 3, 3)  # 7 channels, each by itself
    assert shared.fc1.weight.shape == (16, 16)
