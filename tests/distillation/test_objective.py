"""The objectives: terms and their sum, what is built and used, the frozen tail."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from scalekd.distillation import (
    LIGHT,
    KDObjective,
    PlainObjective,
    ScaleKDConfig,
    ScaleKDObjective,
    StageConfig,
    Targets,
    build_objective,
    feature_terms,
    kd_loss,
)
from scalekd.distillation import objective as objective_module
from scalekd.distillation.losses import view_loss
from scalekd.errors import UsageError

if TYPE_CHECKING:
    from tests.distillation.conftest import Toys, ToyTail

_ALL_TERMS = (
    "task_loss",
    "kd_loss",
    "stage3_spatial_loss",
    "stage3_frequency_loss",
    "stage4_spatial_loss",
    "stage4_frequency_loss",
    "total",
)
_NO_WEIGHT = StageConfig(spatial_weight=0, frequency_weight=0)
_ABLATIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "no-cap": {"cap": False},
    "no-tpp": {"tpp": False},
    "no-cap-no-tpp": {"cap": False, "tpp": False},
    "spatial-only": {"frequency": False},
    "frequency-only": {"spatial": False},
    "no-kd": {"kd": False},
    "self-query": {"self_query": True},
    "layer-norm": {"norm": "layer"},
    "bce": {"task": "bce", "label_smoothing": 0.1},
    "stage4-only": {"stage3": _NO_WEIGHT},
    "stage3-only": {"stage4": _NO_WEIGHT},
    "stage4-self-query-only": {"stage3": _NO_WEIGHT, "self_query": True},
    "swin-s": {"kd": False, "stage4": StageConfig(frequency_weight=0)},
    "light": {"form": LIGHT},
    "light-no-cap": {"form": LIGHT, "cap": False},
    "light-stage4-frequency-only": {"form": LIGHT, "stage3": _NO_WEIGHT, "spatial": False},
}
_EVERY_ABLATION = pytest.mark.parametrize("settings", _ABLATIONS.values(), ids=_ABLATIONS)


@_EVERY_ABLATION
def test_terms_sum_to_the_total_and_every_parameter_learns(
    toys: "Toys", settings: dict[str, Any]
) -> None:
    objective = toys.objective(**settings)
    levels, logits, labels, targets = toys.batch()
    losses = objective(levels, logits, labels, targets)
    losses["total"].backward()

    assert tuple(losses) == objective.loss_names
    terms = [value for name, value in losses.items() if name != "total"]
    torch.testing.assert_close(losses["total"], torch.stack(terms).sum())
    assert all(value > 0 and value.dtype == torch.float32 for value in terms)
    assert all(p.requires_grad and p.grad is not None for p in objective.parameters())
    assert logits.grad is not None


def test_all_terms_are_named(toys: "Toys") -> None:
    assert toys.objective().loss_names == _ALL_TERMS


def test_weights_scale_their_terms(toys: "Toys") -> None:
    weights = {"spatial_weight": 0.3, "frequency_weight": 0.01}
    plain = toys.objective(
        stage3=StageConfig(spatial_weight=1, frequency_weight=1, num_heads=2),
        stage4=StageConfig(spatial_weight=1, frequency_weight=1, num_heads=4),
    )(*toys.batch())
    scaled = toys.objective(
        stage3=StageConfig(**weights, num_heads=2),
        stage4=StageConfig(**weights, num_heads=4),
        kd_alpha=0.2,
    )(*toys.batch())
    for stage in (3, 4):
        for view in ("spatial", "frequency"):
            name = f"stage{stage}_{view}_loss"
            torch.testing.assert_close(scaled[name], weights[f"{view}_weight"] * plain[name])
    torch.testing.assert_close(scaled["kd_loss"], 0.4 * plain["kd_loss"])  # from 0.5 to 0.2
    torch.testing.assert_close(scaled["task_loss"], 1.6 * plain["task_loss"])  # from 0.5 to 0.8


def test_without_the_kd_loss_the_task_loss_keeps_weight_one(toys: "Toys") -> None:
    batch = toys.batch()
    plain = PlainObjective()(*batch)
    assert toys.objective(kd=False)(*batch)["task_loss"] == plain["task_loss"] == plain["total"]


def test_unused_branches_are_not_built(toys: "Toys") -> None:
    built = {name: set(toys.objective(**s).projectors) for name, s in _ABLATIONS.items()}
    assert built["all"] == {
        "stage3_spatial",
        "stage3_frequency",
        "stage4_spatial",
        "stage4_frequency",
    }
    assert built["spatial-only"] == {"stage3_spatial", "stage4_spatial"}
    assert built["frequency-only"] == {"stage3_frequency", "stage4_frequency"}
    assert built["stage3-only"] == {"stage3_spatial", "stage3_frequency"}
    assert built["stage4-self-query-only"] == {"stage4_spatial", "stage4_frequency"}
    assert built["swin-s"] == {"stage3_spatial", "stage3_frequency", "stage4_spatial"}
    assert built["light"] == {"stage3_shared", "stage4_shared"}
    # Stage 4 asks with stage 3's outputs, so stage 3 stays even where its own loss is off.
    assert built["stage4-only"] == built["all"]
    assert built["light-stage4-frequency-only"] == built["light"]


@_EVERY_ABLATION
def test_every_module_that_is_built_runs_once(toys: "Toys", settings: dict[str, Any]) -> None:
    objective = toys.objective(**settings)
    calls = dict.fromkeys(objective.projectors, 0)
    for name, projector in objective.projectors.items():

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        projector.register_forward_hook(count)
    objective(*toys.batch())
    assert set(calls.values()) == {1}


def test_a_weight_of_zero_costs_no_parameter_and_no_loss(
    toys: "Toys", monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(objective: nn.Module) -> int:
        return sum(parameter.numel() for parameter in objective.parameters())

    without = {
        stage: StageConfig(frequency_weight=0, num_heads=heads)
        for stage, heads in (("stage3", 2), ("stage4", 4))
    }
    whole, half = toys.objective(), toys.objective(**without)
    assert size(half) == size(whole) / 2  # both views have projectors of the same size

    def spatial_only(predicted: Tensor, target: Tensor, view: str) -> Tensor:
        assert view == "spatial"
        return view_loss(predicted, target, view)

    monkeypatch.setattr(feature_terms, "view_loss", spatial_only)
    monkeypatch.delattr(objective_module, "kd_loss")
    objective = toys.objective(**without, kd=False)
    assert objective(*toys.batch())["total"].isfinite()


def test_queries_are_learned_only_where_none_are_given(toys: "Toys") -> None:
    asking, own = toys.objective(), toys.objective(self_query=True)
    assert asking.projectors["stage3_spatial"].query_embed is not None
    assert asking.projectors["stage4_spatial"].query_embed is None
    assert own.projectors["stage4_spatial"].query_embed.shape == (6, 16)


def test_both_views_pass_the_tail_in_one_batch(
    toys: "Toys", make_tail: "Callable[[], ToyTail]"
) -> None:
    for settings, expected in (
        ({}, [6]),
        ({"frequency": False}, [3]),
        ({"form": LIGHT}, [3]),
        ({"tpp": False}, []),
        ({"self_query": True, "stage3": _NO_WEIGHT}, []),
    ):
        tail = make_tail()
        toys.objective(tail=tail, **settings)(*toys.batch())
        assert tail.batches == expected


def test_stage_four_teaches_stage_three_through_the_tail(toys: "Toys") -> None:
    levels, logits, labels, targets = toys.batch()
    losses = toys.objective()(levels, logits, labels, targets)
    losses["stage4_frequency_loss"].backward()
    assert levels[0].grad is not None
    assert levels[0].grad.abs().sum() > 0

    levels, logits, labels, targets = toys.batch()
    toys.objective(self_query=True)(levels, logits, labels, targets)[
        "stage4_frequency_loss"
    ].backward()
    assert levels[0].grad is None


def test_the_tail_stays_frozen_and_in_eval_mode(
    toys: "Toys", make_tail: "Callable[[], ToyTail]"
) -> None:
    tail = make_tail().train()
    objective = toys.objective(tail=tail)
    trained = objective.train().requires_grad_(True)
    batch = toys.batch()

    assert not tail.training
    assert not tail.dropout.training
    assert not any(parameter.requires_grad for parameter in tail.parameters())
    before = copy.deepcopy(tail.state_dict())
    assert trained(*batch)["stage3_spatial_loss"] == trained(*batch)["stage3_spatial_loss"]
    trained(*batch)["total"].backward()
    assert all(parameter.grad is None for parameter in tail.parameters())
    assert all(torch.equal(before[name], value) for name, value in tail.state_dict().items())


def test_the_tail_belongs_to_no_optimiser_and_no_checkpoint(toys: "Toys") -> None:
    objective = toys.objective()
    names = {name for name, _ in objective.named_parameters()} | set(objective.state_dict())
    assert names
    assert all(name.startswith("projectors.") for name in names)
    assert not any(isinstance(m, type(objective.tail)) for m in objective.modules())

    other = toys.objective()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(objective.state_dict(), strict=True)


def test_the_tail_moves_with_the_objective(toys: "Toys") -> None:
    inside = nn.ModuleDict({"objective": toys.objective()}).double()
    tail = inside["objective"].tail
    assert {p.dtype for p in [*tail.parameters(), *tail.buffers()]} == {torch.float64}
    assert tail.to("meta") is tail


def test_a_copy_has_its_own_tail(toys: "Toys") -> None:
    objective = toys.objective()
    duplicate = copy.deepcopy(objective).double()
    assert duplicate.tail.merge.weight.dtype == torch.float64
    assert objective.tail.merge.weight.dtype == torch.float32
    assert not duplicate.tail.merge.weight.requires_grad


@_EVERY_ABLATION
def test_bfloat16_autocast_gives_single_precision_losses(
    toys: "Toys", settings: dict[str, Any]
) -> None:
    objective = toys.objective(**settings)
    exact = objective(*toys.batch())
    levels, logits, labels, targets = toys.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = objective(
            [level.bfloat16() for level in levels], logits.bfloat16(), labels, targets
        )
    losses["total"].backward()
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert losses["total"].item() == pytest.approx(exact["total"].item(), rel=0.03)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_targets_of_zeros_and_constants_are_finite(toys: "Toys") -> None:
    levels, logits, labels, targets = toys.batch()
    for features in (torch.zeros(3, 6, 16), torch.full((3, 6, 16), 0.1)):
        objective = toys.objective()
        losses = objective(levels, 1e4 * logits, labels, Targets(features, targets.logits))
        losses["total"].backward()
        assert all(torch.isfinite(value) for value in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in objective.parameters())


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
@_EVERY_ABLATION
def test_data_parallel_steps_find_no_unused_parameter(
    toys: "Toys", settings: dict[str, Any]
) -> None:
    # A parameter left out of one step makes the next forward raise.
    parallel = nn.parallel.DistributedDataParallel(toys.objective(**settings))
    for _ in range(2):
        levels, logits, labels, targets = toys.batch()
        parallel(levels, logits, labels, targets)["total"].backward()
    assert all(parameter.grad is not None for parameter in parallel.parameters())


def test_compiles_without_a_graph_break(toys: "Toys") -> None:
    objective = toys.objective()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    expected, found = objective(*toys.batch()), compiled(*toys.batch())
    torch.testing.assert_close(dict(found), dict(expected))
    found["total"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_no_weight_decay_names_the_positions(toys: "Toys") -> None:
    objective = toys.objective()
    names = objective.no_weight_decay()
    assert names == {f"projectors.{name}.pos_embed" for name in objective.projectors}
    assert names < {name for name, _ in objective.named_parameters()}


def test_kd_objective_is_the_weighted_sum(toys: "Toys") -> None:
    _, logits, labels, targets = toys.batch()
    objective = KDObjective(ScaleKDConfig(kd_alpha=0.9, temperature=4.0))
    losses = objective([], logits, labels, targets)
    assert objective.loss_names == tuple(losses) == ("task_loss", "kd_loss", "total")
    assert targets.logits is not None
    expected = 0.9 * kd_loss(logits, targets.logits.logits, temperature=4.0)
    torch.testing.assert_close(losses["kd_loss"], expected)
    task = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(losses["task_loss"], 0.1 * task)


def test_an_objective_says_which_targets_it_reads(toys: "Toys") -> None:
    needs = [
        (objective.needs_features, objective.needs_logits)
        for objective in (
            build_objective("none"),
            build_objective("kd"),
            toys.objective(),
            toys.objective(kd=False),
        )
    ]
    assert needs == [(False, False), (False, True), (True, True), (True, False)]


def test_objectives_are_built_by_name(toys: "Toys", make_tail: "Callable[[], ToyTail]") -> None:
    shapes = {"student_levels": toys.student_levels, "teacher_stages": toys.teacher_stages}
    built = build_objective("scalekd", tail=make_tail(), **shapes)
    assert type(built) is ScaleKDObjective
    light = build_objective("scalekd-light", tail=make_tail(), **shapes)
    assert set(light.projectors) == {"stage3_shared", "stage4_shared"}
    assert light.loss_names == built.loss_names
    assert type(build_objective("kd", **shapes)) is KDObjective
    assert type(build_objective("none", **shapes)) is PlainObjective
    with pytest.raises(UsageError, match="unknown objective 'dist'"):
        build_objective("dist")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a cache of logits only serves the objective 'kd'"):
        build_objective("scalekd")


def test_what_cannot_be_built_is_refused_with_its_reason(toys: "Toys") -> None:
    shapes = {"student_levels": toys.student_levels, "teacher_stages": toys.teacher_stages}
    with pytest.raises(UsageError, match="pass the tail of the teacher"):
        ScaleKDObjective(**shapes)
    with pytest.raises(UsageError, match=r"every feature loss .* weight 0"):
        toys.objective(spatial=False, frequency=False)
    with pytest.raises(UsageError, match="the divisors of 16 are 1, 2, 4, 8, 16"):
        toys.objective(stage4=StageConfig(num_heads=3))
    with pytest.raises(UsageError, match=r"stages \[3, 4\].* stages \[4\]"):
        ScaleKDObjective(
            student_levels=toys.student_levels, teacher_stages={4: toys.teacher_stages[4]}
        )
    with pytest.raises(UsageError, match="nothing to distil"):
        KDObjective(ScaleKDConfig(kd_alpha=0))


def test_a_final_stage_is_enough_without_the_tail(toys: "Toys") -> None:
    objective = ScaleKDObjective(
        ScaleKDConfig(tpp=False),
        student_levels=toys.student_levels,
        teacher_stages={4: toys.teacher_stages[4]},
    )
    assert objective.tail is None
    assert objective(*toys.batch())["total"].isfinite()


def test_other_inputs_than_built_for_are_refused(toys: "Toys") -> None:
    objective = toys.objective()
    levels, logits, labels, targets = toys.batch()
    with_prefix = Targets(torch.randn(3, 7, 16), targets.logits)
    with pytest.raises(ValueError, match=r"6 patch tokens \(3 x 2\).* prefix tokens"):
        objective(levels, logits, labels, with_prefix)
    with pytest.raises(ValueError, match="the targets have none; read stage 4"):
        objective(levels, logits, labels, Targets(logits=targets.logits))
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        objective(levels, logits, labels, Targets(targets.features))
    with pytest.raises(ValueError, match="last two levels, not 1"):
        objective(levels[:1], logits, labels, targets)
    wrong = toys.objective(tail=nn.Linear(8, 16))
    with pytest.raises(ValueError, match=r"tail returned \(6, 24, 16\).* \(6, 6, 16\)"):
        wrong(levels, logits, labels, targets)


def test_settings_survive_json_and_refuse_what_they_do_not_know() -> None:
    config = ScaleKDConfig(stage4=StageConfig(num_heads=24, softmax_scale=(5.0, 1.0)), kd=False)
    assert ScaleKDConfig.model_validate_json(config.model_dump_json()) == config
    for wrong in ({"alpha": 1}, {"temperature": 0}, {"kd_alpha": 1.5}, {"task": "focal"}):
        with pytest.raises(ValidationError):
            ScaleKDConfig(**wrong)
    with pytest.raises(ValidationError):
        config.kd = True  # type: ignore[misc]


def test_each_view_may_have_its_own_softmax_scale(toys: "Toys") -> None:
    both = toys.objective(stage3=StageConfig(num_heads=2, softmax_scale=(5.0, 0.5)))
    spatial, frequency = (both.projectors[f"stage3_{v}"].scale for v in ("spatial", "frequency"))
    assert (spatial, frequency) == (5.0 / 2, 0.5 / 2)  # head width 4
