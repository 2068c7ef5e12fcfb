"""What ``test_two_processes`` runs under ``torchrun``; results go to ``OUTPUT/<rank>.json``.

torchrun --nproc-per-node 2 two_process_script.py OUTPUT IMAGES
"""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from scalekd.distillation import (
    FullLogits,
    ScaleKDConfig,
    Targets,
    TeacherFeatures,
    build_objective,
)
from scalekd.distributed import Coordinator
from scalekd.errors import CacheMismatch, DataError, ScaleKDError
from scalekd.evaluation import (
    EvaluationConfig,
    EvaluationViews,
    Evaluator,
    evaluate_neighbours,
    live_answers,
)
from scalekd.images import open_dataset
from scalekd.shapes import FeatureShape
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig, load_teacher
from scalekd.training import DistillationModule, NoTargets, TrainConfig, Trainer
from scalekd.training.checkpoint import find_checkpoint
from scalekd.training.interfaces import Evaluate
from scalekd.training.module import freeze_unread

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index


class RankLoader:
    num_batches = 5

    def __init__(self, failing: tuple[int, int, int] | None = None) -> None:
        self.failing = failing

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(start_batch, self.num_batches):
            if (epoch, number, rank) == self.failing:
                raise CacheMismatch("this view is another one")
            random = torch.Generator().manual_seed(100 * epoch + 10 * number + rank)
            pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
            yield {"pixels": pixels, "label": torch.randint(0, 3, (4,), generator=random)}


def make_trainer(
    output: str,
    *,
    failing: tuple[int, int, int] | None = None,
    evaluate: Evaluate | None = None,
    late: bool | None = None,
    **values: Any,
) -> Trainer:
    config = TrainConfig.from_mapping(
        {
            "model": "test_resnet",
            "output": output,
            "objective": "none",
            "batch_size": 4,
            "epochs": 2,
            "grad_accum_steps": 2,
            "model_ema": True,
            "model_ema_decay": 0.5,
            "amp": "no",
            **values,
        }
    )
    torch.manual_seed(config.seed)
    student = create_student(
        "test_resnet", num_classes=3, img_size=32, model_kwargs={"drop_path_rate": 0.2}
    )
    module = DistillationModule(
        student, build_objective("none"), mean=student.spec.mean, std=student.spec.std
    )
    return Trainer(
        config,
        accelerator=accelerator,
        module=module,
        loader=RankLoader(failing),
        targets=NoTargets(),
        evaluate=evaluate,
        late=late,
    )


def attempt(trainer: Trainer) -> str:
    try:
        trainer.fit()
    except ScaleKDError as error:
        return f"{type(error).__name__} {error.exit_code} {trainer._position.num_updates} {error}"
    return "done"


def summed(model: nn.Module) -> dict[str, float]:
    return {"top1": float(sum(parameter.double().sum() for parameter in model.parameters()))}


def not_measured(model: nn.Module) -> dict[str, float]:
    def read() -> None:
        if rank == 1:
            raise DataError("this image is corrupt")

    Coordinator(2).together(read)
    return summed(model)


def measure(
    model: nn.Module, images: str, accelerator: Accelerator, *, batch_size: int
) -> dict[str, float]:
    """Everything that evaluation knows, with a random teacher and the 48 training images."""
    views, gallery = (
        EvaluationViews(open_dataset(images, split), accelerator, batch_size)
        for split in ("val", "train")
    )
    config = EvaluationConfig(img_size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher = load_teacher(
        TeacherConfig(
            model="test_vit", pretrained=False, img_size=(32, 32), model_kwargs={"num_classes": 3}
        )
    )
    evaluator = Evaluator(views, config, answers=live_answers(teacher, views))
    neighbours = evaluate_neighbours(model, views, gallery, config, k=5)
    return {**evaluator(model), **asdict(neighbours)}


def exchanged_gradients() -> dict[str, float]:
    """How far the processes' common gradient is from the mean of both batches' own, by part."""
    torch.manual_seed(0)
    student = create_student("test_vit", num_classes=3, img_size=32)  # no statistics of a batch
    objective = build_objective(
        "scalekd",
        ScaleKDConfig(tpp=False, norm="layer"),
        student_levels=student.spec.levels,
        teacher_stages={4: FeatureShape((3, 3), 8)},
    )
    module = DistillationModule(student, objective, mean=student.spec.mean, std=student.spec.std)
    module = module.eval()
    batches = []
    for number in range(2):
        random = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
        said = Targets(torch.randn((4, 9, 8), generator=random), FullLogits(torch.zeros(4, 3)))
        batches.append((pixels, torch.arange(4) % 3, said))
    for batch in batches:
        (module(*batch).losses["total"] / 2).backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    parallel = accelerator.prepare(module)
    parallel(*batches[rank]).losses["total"].backward()
    found = {"student": 0.0, "projectors": 0.0}
    for name, parameter in module.named_parameters():
        part = "student" if name.startswith("student") else "projectors"
        # Some gradients are zero but for rounding, such as those of biases before a norm.
        size = expected[name].norm().clamp(min=1e-2)
        found[part] = max(found[part], float((parameter.grad - expected[name]).norm() / size))
    return found


def contrast_gradient() -> float:
    """Distance of the common gradient of a contrast from that of one batch of all views."""
    torch.manual_seed(0)
    student = create_student("test_vit", num_classes=0, img_size=32)
    objective = build_objective(
        "features",
        ScaleKDConfig(spatial=False, frequency=False),
        student_levels=student.spec.levels,
        teacher_stages={4: FeatureShape((3, 3), 8)},
        student_features=student.num_features(),
        others={
            "second": TeacherFeatures(
                ScaleKDConfig(spatial=False, frequency=False), {4: FeatureShape((2, 2), 4)}
            )
        },
    )
    module = DistillationModule(
        student, objective, mean=student.spec.mean, std=student.spec.std, labelled="none"
    )
    freeze_unread(student, pooled=True)
    random = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=random, dtype=torch.uint8)
    features, second = (
        torch.randn(8, 9, 8, generator=random),
        torch.randn(8, 4, 4, generator=random),
    )
    tokens = torch.randn(8, 8, generator=random)

    def targets(part: slice) -> Targets:
        further = {"second": Targets(second[part].bfloat16())}
        return Targets(features[part], class_token=tokens[part], others=further)

    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    parallel = accelerator.prepare(module)
    mine = slice(4 * rank, 4 * rank + 4)
    parallel(pixels[mine], torch.zeros(4), targets(mine)).losses["total"].backward()
    found = {name: parameter.grad.clone() for name, parameter in trained.items()}
    module.zero_grad()
    for name, buffer in module.named_buffers():  # the statistics so far
        if name.rpartition(".")[2] in ("target_mean", "target_variance", "num_targets"):
            buffer.zero_()
    everything = slice(0, 8)
    levels = student(module.normalise(pixels), pooled=True)
    losses = objective(
        levels.levels, levels.logits, torch.zeros(8), targets(everything), pooled=levels.pooled
    )
    losses["total"].backward()
    return max(
        float((found[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-2))
        for name, parameter in trained.items()
    )


def partly_labelled_gradient() -> dict[str, float]:
    """Distance of the common gradient from that of one batch of all views, of which few count."""
    torch.manual_seed(0)
    student = create_student("test_vit", num_classes=3, img_size=32)
    module = DistillationModule(
        student,
        build_objective("none"),
        mean=student.spec.mean,
        std=student.spec.std,
        labelled="some",
    ).eval()
    random = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=random, dtype=torch.uint8)
    labels = torch.tensor([0, -1, -1, -1, 1, 2, -1, 0])  # one of rank 0, three of rank 1
    logits = student(module.normalise(pixels)).logits
    (nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0])).backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    parallel = accelerator.prepare(module)
    mine = slice(4 * rank, 4 * rank + 4)
    output = parallel(pixels[mine], labels[mine], Targets())
    output.losses["total"].backward()
    return {
        "gradient": max(
            float((parameter.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-2))
            for name, parameter in module.named_parameters()
        ),
        "top1": float(output.metrics["top1"]),
    }


def main(output: Path, images: str) -> None:
    told: dict[str, Any] = {"gradients": exchanged_gradients()}
    told["partly"] = partly_labelled_gradient()
    told["contrast"] = contrast_gradient()
    whole = make_trainer(str(output / "whole"))
    told["whole"] = attempt(whole)
    told["statistics"] = [float(b.double().sum()) for b in whole._state.student.buffers()]
    told["weights"] = [float(p.double().sum()) for p in whole._state.student.parameters()]

    # The processes agree where a line is logged; otherwise in every tenth update.
    broken = make_trainer(str(output / "broken"), log_interval=2)
    update = broken._update

    def and_preempt(*arguments: Any) -> Any:
        if broken._position.num_updates == 3 and rank == 1:
            broken._stop.signal_number = signal.SIGTERM  # one process is told, both must stop
        return update(*arguments)

    broken._update = and_preempt
    told["preempted"] = attempt(broken)
    told["resumed"] = attempt(make_trainer(str(output / "broken"), resume="auto"))
    failing = make_trainer(str(output / "failing"), failing=(1, 2, 1))
    sums = []
    step = failing._update

    def and_sum(*arguments: Any) -> Any:
        sums.append(summed(failing._state.student)["top1"])
        return step(*arguments)

    failing._update = and_sum
    told["failing"] = attempt(failing)
    sums.append(summed(failing._state.student)["top1"])
    told["sums"] = sums
    late = make_trainer(str(output / "late"), late=True)
    told["late"] = attempt(late)
    poisoned = make_trainer(str(output / "poisoned"), late=True, log_interval=2, epochs=3)
    forward = poisoned._forward

    def poison(batch: Any) -> Any:
        result = forward(batch)
        if poisoned._position.num_updates == 2 and rank == 1:
            return result._replace(losses={n: x * float("nan") for n, x in result.losses.items()})
        return result

    poisoned._forward = poison
    told["poisoned"] = attempt(poisoned)
    told["poisoned_sum"] = summed(poisoned._state.student)["top1"]

    told["measured"] = attempt(make_trainer(str(output / "measured"), evaluate=summed))
    again = str(output / "again")
    told["unmeasured"] = attempt(make_trainer(again, evaluate=not_measured))
    told["kept"] = find_checkpoint(output / "again/last") is not None
    told["again"] = attempt(make_trainer(again, evaluate=summed, resume="auto"))

    student = whole._state.student
    told["evaluation"] = measure(student.eval(), images, accelerator, batch_size=4)
    (output / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
