"""What each part of the light form saves, in FLOPs of one training step.

    python -m benchmarks.accuracy.flops

Students at 224 px, taught by Swin-L; forward and backward of one image on torch's meta device, so
that nothing is computed. Writes ``benchmarks/results/step_flops.json``.
"""

import json
from pathlib import Path
from typing import Any

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

STUDENTS = ("resnet50", "vit_small_patch16_224")
FORMS: dict[str, Form | None] = {
    "no teacher": None,
    "ScaleKD, as published": PUBLISHED,
    "one projector for both views": Form(shared_views=True, depthwise_stem=False, ffn_ratio=4),
    "and a depthwise stem": Form(shared_views=True, depthwise_stem=True, ffn_ratio=4),
    "and an MLP of ratio 1 (ScaleKD-light)": LIGHT,
}
_SWIN_L = TailConfig(
    architecture="swin_large_patch4_window7_224",
    family="swin",
    img_size=(224, 224),
    num_classes=1000,
    global_pool="avg",
)
_RESULTS = Path(__file__).parents[1] / "results" / "step_flops.json"


def step_flops(student: str, form: Form | None) -> int:
    """Forward and backward of one image; without a form, of the student alone."""
    model = create_student(student, num_classes=1000, img_size=224).to("meta")
    tail = Tail.on_meta(_SWIN_L).to("meta")
    objective: Objective = PlainObjective()
    if form is not None:
        objective = ScaleKDObjective(
            form=form, student_levels=model.spec.levels, teacher_stages=tail.stages, tail=tail
        )
    objective.to("meta")
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward}
    )
    with torch.device("meta"):
        pixels, labels = torch.randn(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64)
        shape = tail.stages[4]
        features = torch.randn(1, shape.num_patch_tokens, shape.num_channels)
        targets = Targets(features, FullLogits(torch.randn(1, 1000)))
        with counter:
            output = model(pixels)
            losses = objective(output.levels, output.logits, labels, targets)
            losses["total"].backward()
    return int(counter.get_total_flops())


def _conv_backward(
    grad_shape: Any, x_shape: Any, weight_shape: Any, *others: Any, out_shape: Any = None
) -> int:
    """As the forward, once for the map and once for the weights.

    torch's own formula counts every group of a depthwise convolution as a dense one.
    """
    transposed, output_mask = others[4], others[7]
    forward: int = conv_flop_count(x_shape, weight_shape, grad_shape, transposed=transposed)
    return forward * sum(output_mask[:2])


def main() -> None:
    gflop = {
        student: {name: step_flops(student, form) / 1e9 for name, form in FORMS.items()}
        for student in STUDENTS
    }
    result = {"teacher": _SWIN_L.architecture, "torch": torch.__version__, "gflop": gflop}
    _RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
