"""What one image costs with each recipe, in FLOPs: the teacher, the student alone, and a step.

    python -m benchmarks.recipe_flops

Counted on torch's meta device, so that nothing is computed. Prints the ``gflop`` line of every file
in ``pipelines/recipes``; a test compares the two.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy.flops import _conv_backward
from scalekd.distillation import FullLogits, Targets, build_objective
from scalekd.models.build import create_on_meta
from scalekd.pipelines.configure import recipe_about, recipe_names, train_config
from scalekd.students import create_student
from scalekd.teachers import resolve_model_name
from scalekd.teachers.families import family_of
from scalekd.teachers.tail import Tail, TailConfig


def recipe_gflop(name: str) -> dict[str, int]:
    """GFLOP an image: ``teacher`` forward, ``student`` and whole ``step`` forward and backward."""
    config, about = train_config(name, {"output": ""}), recipe_about(name)
    side = int(about["teacher_img_size"])
    architecture = resolve_model_name(about["teacher"])[0].partition(".")[0]
    teacher = create_on_meta(architecture, {"img_size": side})
    with torch.device("meta"), _counter() as counter, torch.no_grad():
        teacher(torch.randn(1, 3, side, side))
    counts = {"teacher": counter.get_total_flops()}

    tail = Tail.on_meta(
        TailConfig(
            architecture=architecture,
            family=family_of(teacher, architecture).name,  # type: ignore[arg-type,union-attr]
            img_size=(side, side),
            num_classes=1000,
            global_pool=str(teacher.global_pool),
        )
    )
    entering = tail.stages[3]
    if entering.num_prefix_tokens:
        tail.prefix_tokens = torch.zeros(
            entering.num_prefix_tokens, entering.num_channels, device="meta"
        )
    student = create_student(
        config.model,
        num_classes=1000,
        img_size=config.img_size,
        model_kwargs=config.model_kwargs,
    ).to("meta")
    for part, objective in (("student", "none"), ("step", config.objective)):
        losses = build_objective(
            objective,  # type: ignore[arg-type]
            config.objective_config,
            student_levels=student.spec.levels,
            teacher_stages=tail.stages,
            tail=tail,
        ).to("meta")
        shape = tail.stages[4]
        with torch.device("meta"), _counter() as counter:
            output = student(torch.randn(1, 3, *student.spec.img_size))
            features = torch.randn(1, shape.num_patch_tokens, shape.num_channels)
            targets = Targets(features, FullLogits(torch.randn(1, 1000)))
            labels = torch.zeros(1, dtype=torch.int64)
            losses(output.levels, output.logits, labels, targets)["total"].backward()
        counts[part] = counter.get_total_flops()
    return {part: round(count / 1e9) for part, count in counts.items()}


def _counter() -> FlopCounterMode:
    mapping = {torch.ops.aten.convolution_backward: _conv_backward}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def main() -> None:
    for name in recipe_names():
        counts = ", ".join(f"{part}: {count}" for part, count in recipe_gflop(name).items())
        print(f"{name}\n  gflop: {{{counts}}}")


if __name__ == "__main__":
    main()
