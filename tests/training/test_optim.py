from typing import Any

import pytest
import timm
import torch
from torch import nn

from scalekd.distillation import ScaleKDConfig, ScaleKDObjective
from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape
from scalekd.students import create_student
from scalekd.training import TrainConfig, build_optimizer, build_scheduler, parameter_groups


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 2, 2))
        self.query = nn.Embedding(4, 8)
        self.norm = nn.LayerNorm(8)


@pytest.fixture
def student() -> nn.Module:
    return timm.create_model("test_vit", num_classes=5, img_size=32)


def decay_of(groups: list[dict[str, Any]], parameter: nn.Parameter) -> float:
    return next(g["weight_decay"] for g in groups if any(p is parameter for p in g["params"]))


def config(**values: Any) -> TrainConfig:
    return TrainConfig.from_mapping({"model": "test_vit", "output": "run", **values})


def test_published_exclusions_of_weight_decay(student: Any) -> None:
    projector = Projector()
    groups = parameter_groups(student, projector, lr=1, weight_decay=0.05)
    for parameter in (student.pos_embed, student.cls_token, student.norm.weight, student.head.bias):
        assert decay_of(groups, parameter) == 0
    assert decay_of(groups, projector.pos_embed) == decay_of(groups, projector.norm.weight) == 0
    assert decay_of(groups, student.head.weight) == 0.05
    assert decay_of(groups, projector.query.weight) == 0.05  # decayed in the reference too


def test_the_real_projectors_and_student_are_decayed_as_published() -> None:
    """Section by section of the DeiT-B recipe: norms, biases, vectors, tokens and positions not."""
    student = create_student("test_vit", num_classes=5, img_size=32)
    objective = ScaleKDObjective(
        student_levels=student.spec.levels,
        teacher_stages={4: FeatureShape((3, 3), 24)},
        config=ScaleKDConfig(tpp=False, self_query=True),
    )
    groups = parameter_groups(student.model, objective, lr=1, weight_decay=0.05)
    named = [*student.model.named_parameters(), *objective.named_parameters()]
    kept = {name for name, p in named if decay_of(groups, p) == 0}
    decayed = {name for name, p in named if decay_of(groups, p) == 0.05}
    assert kept | decayed == {name for name, _ in named}
    assert {"pos_embed", "cls_token"} <= kept
    for place in ("stage3_spatial", "stage4_frequency"):
        start = f"projectors.{place}."
        assert start + "pos_embed" in kept
        assert start + "query_embed" in decayed  # decayed in the reference too
    parts = {name: name.rpartition(".")[2] for name, _ in named}
    weights = dict(named)
    for name in decayed:
        assert parts[name] in ("weight", "query_embed")
        assert weights[name].ndim >= 2
    for name in kept:
        assert weights[name].ndim <= 1 or parts[name] in ("pos_embed", "cls_token", "reg_token")


def test_what_an_objective_lists_is_not_decayed(student: nn.Module) -> None:
    projector = Projector()
    projector.no_weight_decay = lambda: {"query.weight"}  # type: ignore[method-assign, assignment]
    groups = parameter_groups(student, projector, lr=1, weight_decay=0.05)
    assert decay_of(groups, projector.query.weight) == 0


def test_what_a_student_lists_is_not_decayed(student: Any) -> None:
    student.no_weight_decay = lambda: {"head.weight"}
    groups = parameter_groups(student, Projector(), lr=1, weight_decay=0.05)
    assert decay_of(groups, student.head.weight) == 0


def test_everything_is_decayed_on_request(student: nn.Module) -> None:
    projector = Projector()
    (group,) = parameter_groups(student, projector, lr=1, weight_decay=0.02, wd_exclude="none")
    total = [*student.parameters(), *projector.parameters()]
    assert len(group["params"]) == len(total)
    assert group["weight_decay"] == 0.02


def test_every_trainable_parameter_is_in_one_group(student: nn.Module) -> None:
    projector = Projector()
    student.head.requires_grad_(False)  # type: ignore[operator, union-attr]
    groups = parameter_groups(student, projector, lr=1, weight_decay=0.05, layer_decay=0.5)
    found = [id(p) for group in groups for p in group["params"]]
    trainable = [p for m in (student, projector) for p in m.parameters() if p.requires_grad]
    assert sorted(found) == sorted(id(p) for p in trainable)


def test_layer_decay_scales_the_students_rates_and_not_the_projectors(student: Any) -> None:
    projector = Projector()
    optimizer = build_optimizer(
        config(opt="sgd", lr=0.1, layer_decay=0.5, sched="constant"), student, projector
    )
    scheduler, _ = build_scheduler(
        config(opt="sgd", lr=0.1, layer_decay=0.5, sched="constant"),
        optimizer,
        updates_per_epoch=1,
    )
    assert scheduler is not None
    scheduler.step(0)

    def rate(parameter: nn.Parameter) -> float:
        groups = optimizer.param_groups
        return next(g["lr"] for g in groups if any(p is parameter for p in g["params"]))

    assert rate(projector.query.weight) == rate(student.head.weight) == pytest.approx(0.1)
    assert rate(projector.pos_embed) == pytest.approx(0.1)  # the student has one of this name
    assert rate(student.pos_embed) < 0.05
    last, before = (student.blocks[-n].mlp.fc1.weight for n in (1, 2))
    assert rate(before) == pytest.approx(0.5 * rate(last))
    assert rate(student.patch_embed.proj.weight) < rate(student.blocks[0].mlp.fc1.weight)


def test_the_rate_warms_up_and_falls_by_updates(student: nn.Module) -> None:
    values = {"opt": "sgd", "lr": 1.0, "epochs": 10, "warmup_epochs": 2, "warmup_lr": 0.0}
    settings = config(**values, sched_on_updates=True, min_lr=0.0)
    optimizer = build_optimizer(settings, student, Projector())
    scheduler, num_epochs = build_scheduler(settings, optimizer, updates_per_epoch=5)
    assert num_epochs == 10
    assert scheduler is not None
    rates = []
    for update in range(50):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[5] == pytest.approx(0.5)  # half of the ten warm-up updates
    # Cosine over all 50 updates: 0.5 * (1 + cos(pi * 25 / 50)) at the middle.
    assert rates[25] == pytest.approx(0.5)
    assert rates[49] < 0.01


@pytest.mark.parametrize("opt", ["lamb", "adamw", "sgd", "lion", "lookahead_adamw"])
def test_timms_optimisers_take_a_step(student: nn.Module, opt: str) -> None:
    optimizer = build_optimizer(config(opt=opt, opt_eps=1e-6), student, nn.Identity())
    before = student.head.weight.clone()  # type: ignore[operator, union-attr]
    student(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, student.head.weight)  # type: ignore[arg-type, union-attr]


def test_an_unknown_optimiser_is_a_usage_error(student: nn.Module) -> None:
    with pytest.raises(UsageError, match="--opt adamx"):
        build_optimizer(config(opt="adamx"), student, nn.Identity())
    with pytest.raises(UsageError, match="--opt sgd"):
        build_optimizer(config(opt="sgd", opt_args={"nonsense": 1}), student, nn.Identity())


def test_nothing_to_train_is_a_usage_error(student: nn.Module) -> None:
    with pytest.raises(UsageError, match="no parameter is trainable"):
        build_optimizer(config(), student.requires_grad_(False), nn.Identity())


@pytest.mark.parametrize("opt", ["adahessian", "lookahead_adahessian"])
def test_an_optimiser_of_second_order_is_refused(student: nn.Module, opt: str) -> None:
    with pytest.raises(UsageError, match=f"--opt {opt}: needs second derivatives"):
        build_optimizer(config(opt=opt), student, nn.Identity())
