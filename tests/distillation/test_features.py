"""The objective without labels and logits, and labels that are missing for some images."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalekd.distillation import (
    LIGHT,
    FeaturesObjective,
    FullLogits,
    KDObjective,
    PlainObjective,
    ScaleKDConfig,
    ScaleKDObjective,
    StageConfig,
    Targets,
    build_objective,
    contrast_loss,
    summary_loss,
)
from scalekd.distillation.summary import SummaryProjector
from scalekd.errors import UsageError

if TYPE_CHECKING:
    from tests.distillation.conftest import Toys, ToyTail

NO_WEIGHT = StageConfig(spatial_weight=0, frequency_weight=0)
FEATURES = ("stage3_spatial_loss", "stage3_frequency_loss", "stage4_spatial_loss")
ALL = (*FEATURES, "stage4_frequency_loss", "summary_loss", "total")


@pytest.fixture
def build(toys: "Toys", make_tail: "Callable[[], ToyTail]") -> Callable[..., FeaturesObjective]:
    def objective(**settings: Any) -> FeaturesObjective:
        torch.manual_seed(0)
        heads = {"stage3": StageConfig(num_heads=2), "stage4": StageConfig(num_heads=4)}
        built = build_objective(
            "features",
            ScaleKDConfig(**{**heads, **settings}),
            student_levels=toys.student_levels,
            teacher_stages=toys.teacher_stages,
            tail=make_tail(),
            student_features=7,
        )
        assert isinstance(built, FeaturesObjective)
        return built

    return objective


def pooled() -> Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(5)).requires_grad_()


def test_neither_labels_nor_logits_are_read(
    toys: "Toys", build: Callable[..., FeaturesObjective]
) -> None:
    objective = build()
    levels, logits, _, targets = toys.batch()
    given = {"levels": levels, "targets": Targets(targets.features), "pooled": pooled()}
    unlabelled = torch.full((3,), -1)
    losses = objective(logits=torch.full_like(logits, torch.nan), labels=unlabelled, **given)
    assert tuple(losses) == objective.loss_names == ALL
    needs = [objective.needs_features, objective.needs_pooled]
    assert needs == [True, True]
    refused = [objective.needs_labels, objective.needs_logits, objective.trains_classifier]
    assert refused == [False, False, False]
    losses["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert all(tensor.grad.any() for tensor in (*levels, given["pooled"]))


def test_the_summary_is_the_angle_to_the_class_token_or_to_the_mean_patch_token(
    toys: "Toys", build: Callable[..., FeaturesObjective]
) -> None:
    objective = build(summary_weight=0.5, summary="direction")
    levels, logits, labels, targets = toys.batch()
    assert targets.features is not None
    token, features = torch.randn(3, 16), pooled()
    linear = objective.projectors["summary"]
    assert (linear.in_features, linear.out_features) == (7, 16)
    for said, expected in (
        (Targets(targets.features, class_token=token), token),
        (Targets(targets.features), targets.features.mean(dim=1)),
    ):
        losses = objective(levels, logits, labels, said, pooled=features)
        cosine = F.cosine_similarity(linear(features), expected).mean()
        torch.testing.assert_close(losses["summary_loss"], 0.5 * (2 - 2 * cosine))


@pytest.mark.parametrize(
    "settings", [{}, {"summary_temperature": 0.5}, {"summary": "standardised"}]
)
def test_the_summary_is_compared_with_standardised_class_tokens(
    toys: "Toys", build: Callable[..., FeaturesObjective], settings: dict[str, Any]
) -> None:
    objective = build(summary_weight=0.5, **settings)
    levels, logits, labels, targets = toys.batch()
    assert targets.features is not None
    # Channels of very different mean and deviation, as class tokens have them.
    scales, means = 10 ** torch.linspace(-1, 1, 16), torch.linspace(-50, 50, 16)
    tokens = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) * scales + means
    projector, features = objective.projectors["summary"], pooled()
    for token in tokens.split(3):
        said = Targets(targets.features, class_token=token)
        losses = objective(levels, logits, labels, said, pooled=features)
    expected = (tokens - tokens.mean(dim=0)) / tokens.std(dim=0, correction=0)
    cosines = F.cosine_similarity(projector(features)[:, None], expected[None, 3:], dim=-1)
    if "summary" in settings:
        by_hand = (2 - 2 * cosines.diag()).mean()
    else:
        scores = cosines / settings.get("summary_temperature", 0.1)
        by_hand = -(scores.diag() - scores.exp().sum(dim=1).log()).mean()
    torch.testing.assert_close(losses["summary_loss"], 0.5 * by_hand)
    assert {"projectors.summary.target_mean", "projectors.summary.target_variance"} < set(
        objective.state_dict()
    )


@pytest.mark.parametrize("sizes", [[40], [1, 1, 38], [7, 33], [20, 20]])
def test_the_statistics_of_summaries_do_not_depend_on_the_batches(sizes: list[int]) -> None:
    targets = torch.randn(40, 5, generator=torch.Generator().manual_seed(2)) * 3 + 100
    targets[:, 4] = 7  # a channel that is constant
    projector = SummaryProjector(3, 5, standardised=True)
    for batch in targets.split(sizes):
        assert projector.standardise(batch).isfinite().all()
    projector.eval()
    standardised = projector.standardise(targets)
    torch.testing.assert_close(standardised[:, :4].mean(dim=0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        standardised[:, :4].std(dim=0, correction=0), torch.ones(4), atol=1e-4, rtol=0
    )
    assert not standardised[:, 4].any()
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    projector.standardise(targets * 2)  # evaluation counts nothing
    assert all(torch.equal(value, before[name]) for name, value in projector.state_dict().items())


def test_the_summary_of_a_single_image_has_no_direction_yet() -> None:
    projector = SummaryProjector(3, 5, standardised=True).double()
    features = torch.randn(1, 3, dtype=torch.float64)
    target = projector.standardise(torch.randn(1, 5))
    loss = summary_loss(projector(features), target)
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert projector.weight.grad is not None
    assert projector.weight.grad.isfinite().all()


def test_the_contrast_is_small_for_the_own_target_only() -> None:
    target = torch.eye(4)[:, :3].repeat(1, 2) + torch.tensor([0, 0, 0, 1, 1, 1.0])
    target = target - target.mean(dim=0)
    assert contrast_loss(5 * target, target, temperature=0.01).item() < 1e-3
    assert contrast_loss(target.flip(0), target, temperature=0.01).item() > 10
    assert contrast_loss(target, target[:1].expand(4, 6), temperature=0.1).item() == pytest.approx(
        math.log(4)  # equal targets cannot be told apart
    )
    predicted = torch.randn(4, 6, requires_grad=True)
    contrast_loss(predicted, target.requires_grad_(), temperature=0.1).backward()
    assert target.grad is None
    assert predicted.grad is not None
    assert predicted.grad.any()
    with pytest.raises(ValueError, match="differs"):
        contrast_loss(torch.randn(4, 5), target, temperature=0.1)


def test_the_contrast_chooses_among_targets_of_other_images_too() -> None:
    predicted, target = torch.randn(4, 6), torch.randn(7, 6)
    cosines = torch.nn.functional.cosine_similarity(predicted[:, None], target[None], dim=2)
    expected = -torch.stack([row.div(0.1).log_softmax(0)[i] for i, row in enumerate(cosines)])
    torch.testing.assert_close(contrast_loss(predicted, target, temperature=0.1), expected.mean())
    with pytest.raises(ValueError, match="shape"):
        contrast_loss(target, predicted, temperature=0.1)


def test_the_contrast_is_exact_under_autocast() -> None:
    predicted, target = torch.randn(2, 8, 96, generator=torch.Generator().manual_seed(3))
    exact = contrast_loss(predicted, target, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrast_loss(predicted, target, temperature=0.01), exact)


def test_the_summary_loss_is_zero_for_equal_directions_and_four_for_opposite_ones() -> None:
    target = torch.randn(4, 6)
    assert summary_loss(3 * target, target).item() == pytest.approx(0, abs=1e-6)
    assert summary_loss(-target, target).item() == pytest.approx(4)
    predicted = torch.randn(4, 6, requires_grad=True)
    summary_loss(predicted, target.requires_grad_()).backward()
    assert target.grad is None
    assert predicted.grad is not None
    with pytest.raises(ValueError, match="differs"):
        summary_loss(torch.randn(4, 5), target)


@pytest.mark.parametrize(
    ("settings", "terms", "projectors"),
    [
        ({"summary_weight": 0}, ALL[:4], {"stage3_shared", "stage4_shared"}),
        ({"spatial": False, "frequency": False}, ("summary_loss",), {"summary"}),
        ({"stage3": NO_WEIGHT, "stage4": NO_WEIGHT}, ("summary_loss",), {"summary"}),
        ({"frequency": False, "summary_weight": 0}, (ALL[0], ALL[2]), None),
        ({"spatial": False, "summary_weight": 0}, (ALL[1], ALL[3]), None),
    ],
)
def test_a_part_without_weight_is_neither_built_nor_computed(
    toys: "Toys",
    build: Callable[..., FeaturesObjective],
    settings: dict[str, Any],
    terms: tuple[str, ...],
    projectors: set[str] | None,
) -> None:
    objective = build(**settings)
    assert objective.loss_names == (*terms, "total")
    if projectors is not None:
        assert set(objective.projectors) == projectors
    assert objective.needs_pooled == ("summary_loss" in terms)
    given = {"pooled": pooled()} if objective.needs_pooled else {}
    losses = objective(*toys.batch(), **given)
    losses["total"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_no_loss_at_all_and_missing_shapes_are_refused(
    toys: "Toys", build: Callable[..., FeaturesObjective]
) -> None:
    with pytest.raises(UsageError, match=r"every feature loss .* weight 0"):
        build(spatial=False, frequency=False, summary_weight=0)
    shapes = {"student_levels": toys.student_levels, "teacher_stages": toys.teacher_stages}
    with pytest.raises(UsageError, match="pass student_features"):
        build_objective("features", ScaleKDConfig(tpp=False), **shapes)
    objective = build()
    with pytest.raises(ValueError, match="pass pooled"):
        objective(*toys.batch())


def test_the_published_objective_has_a_summary_only_where_it_is_asked_for(toys: "Toys") -> None:
    assert "summary" not in toys.objective().projectors
    with_summary = ScaleKDObjective(
        ScaleKDConfig(tpp=False, summary_weight=1),
        form=LIGHT,
        student_levels=toys.student_levels,
        teacher_stages=toys.teacher_stages,
        student_features=7,
    )
    losses = with_summary(*toys.batch(), pooled=pooled())
    assert {"task_loss", "kd_loss", "summary_loss"} < set(losses)


def test_the_default_weights_of_a_view_add_up_to_four_and_three() -> None:
    config, stated = ScaleKDConfig(), StageConfig(spatial_weight=0.08, frequency_weight=0)
    for num_tokens in (6, 49, 1369):
        for stage in (3, 4):
            weights = (
                config.feature_weight(stage, v, num_tokens) for v in ("spatial", "frequency")
            )
            assert [num_tokens * weight for weight in weights] == pytest.approx([4, 3])
        assert stated.weight("spatial", num_tokens) == 0.08
        assert stated.weight("frequency", num_tokens) == 0
    assert ScaleKDConfig(spatial=False).feature_weight(3, "spatial", 49) == 0


@pytest.mark.parametrize("name", ["scalekd", "scalekd-light", "features"])
def test_default_weights_are_those_of_the_teachers_tokens(toys: "Toys", name: Any) -> None:
    stages = {"num_heads": 2}, {"num_heads": 4}
    values = []
    for weights in ({}, {"spatial_weight": 4 / 6, "frequency_weight": 3 / 6}):
        torch.manual_seed(0)
        stage3, stage4 = (StageConfig(**stage, **weights) for stage in stages)
        objective = build_objective(
            name,
            ScaleKDConfig(stage3=stage3, stage4=stage4, tpp=False, summary_weight=0),
            student_levels=toys.student_levels,
            teacher_stages=toys.teacher_stages,  # 6 tokens
        )
        values.append(objective(*toys.batch())["total"])
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"task": "bce"}])
def test_an_image_without_a_label_is_left_out_of_the_task_loss_only(
    toys: "Toys", settings: dict[str, Any]
) -> None:
    _, logits, labels, targets = toys.batch()
    assert isinstance(targets.logits, FullLogits)
    objective = KDObjective(ScaleKDConfig(**settings))
    partly = torch.tensor([0, -1, 2])
    losses = objective([], logits, partly, targets)
    kept = objective(
        [],
        logits[[0, 2]],
        labels[[0, 2]],
        Targets(logits=targets.logits.__class__(targets.logits.logits[[0, 2]])),
    )
    torch.testing.assert_close(losses["task_loss"], kept["task_loss"])
    torch.testing.assert_close(losses["kd_loss"], objective([], logits, labels, targets)["kd_loss"])
    losses["task_loss"].backward()
    assert logits.grad is not None
    assert not logits.grad[1].any()
    assert logits.grad[[0, 2]].any(dim=1).all()


@pytest.mark.parametrize("task", ["cross_entropy", "bce"])
def test_a_batch_without_labels_costs_nothing_and_has_a_gradient(toys: "Toys", task: Any) -> None:
    _, logits, _, targets = toys.batch()
    losses = PlainObjective(ScaleKDConfig(task=task))([], logits, torch.full((3,), -1), targets)
    losses["total"].backward()
    assert losses["total"].item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_divisor_of_the_task_loss_may_be_that_of_several_processes(toys: "Toys") -> None:
    _, logits, labels, targets = toys.batch()
    objective = PlainObjective()
    mean = objective([], logits, labels, targets)["task_loss"]
    shared = objective([], logits, labels, targets, num_labelled=torch.tensor(1.5))["task_loss"]
    torch.testing.assert_close(shared, 2 * mean)  # 3 labelled images here, 1.5 on average


def test_the_logit_loss_alone_reads_no_labels(toys: "Toys") -> None:
    _, logits, _, targets = toys.batch()
    objective = KDObjective(ScaleKDConfig(kd_alpha=1))
    assert (objective.needs_labels, objective.loss_names) == (False, ("kd_loss", "total"))
    losses = objective([], logits, torch.full((3,), -1), targets)
    assert tuple(losses) == objective.loss_names
    assert losses["total"] > 0


def test_it_compiles_without_a_graph_break(
    toys: "Toys", build: Callable[..., FeaturesObjective]
) -> None:
    objective = build()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    batch = toys.batch()
    expected, found = objective(*batch, pooled=pooled()), compiled(*batch, pooled=pooled())
    torch.testing.assert_close(dict(found), dict(expected))
