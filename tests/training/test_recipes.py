"""Every published pair, against the table of the method's description, typed again by hand."""

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from scalekd.cli import recipes as recipes_command
from scalekd.pipelines.configure import (
    RECIPES,
    departures_from_recipe,
    describe_recipe,
    recipe_names,
    train_config,
)
from scalekd.students import resolve_student_name
from scalekd.teachers import resolve_model_name
from scalekd.training import build_optimizer, build_scheduler
from scalekd.views import ViewPolicy

# name: optimiser, lr, weight decay, batch a process, heads 3 and 4, softmax scale, weights 3, 4
PUBLISHED = {
    "swin_l-vit_b16": ("adamw", 1e-3, 0.05, 16, 8, 8, 5, 0.08, 0.06),
    "swin_l-resnet50d": ("lamb", 5e-3, 0.02, 64, 16, 24, 5, 0.08, 0.06),
    "swin_l-resnet50": ("momentum", 0.1, 1e-4, 32, 16, 24, 5, 0.08, 0.06),
    "swin_b-resnet50": ("momentum", 0.1, 1e-4, 32, 8, 16, 5, 0.08, 0.06),
    "swin_s-resnet50": ("momentum", 0.1, 1e-4, 32, 3, 6, 5, 0.08, 0.06),
    "swin_l-mobilenetv1": ("momentum", 0.1, 1e-4, 32, 16, 24, 5, 0.08, 0.06),
    "swin_l-vit_s16": ("adamw", 1e-3, 0.05, 32, 8, 8, 5, 0.08, 0.06),
    "swin_l-convnext_t": ("adamw", 1e-3, 0.05, 32, 8, 16, 1, 0.08, 0.06),
    "swin_l-swin_t": ("adamw", 1e-3, 0.05, 16, 24, 48, 1, 0.08, 0.06),
    "swin_l-mixer_s16": ("adamw", 7e-4, 0.067, 24, 8, 8, 5, 0.08, 0.06),
    "swin_l-mixer_b16": ("adamw", 7e-4, 0.067, 48, 8, 8, 5, 0.08, 0.06),
    "swin_l-mobilenetv1-lamb": ("lamb", 2e-3, 0.004, 64, 16, 24, 5, 0.08, 0.06),
    "eva_l-vit_b14": ("adamw", 1e-3, 0.05, 32, 8, 8, 1, 0.016, 0.008),
    "eva_l-resnet50d": ("lamb", 5e-3, 0.02, 64, 8, 8, 0.2, 0.016, 0.008),
    "eva_l-mixer_b14": ("adamw", 7e-4, 0.067, 24, 8, 8, 1, 0.016, 0.008),
    "eva_l-eva02_s": ("adamw", 1e-3, 0.05, 16, 8, 8, 1, 0.008, 0.004),
}
CLIP = {
    **dict.fromkeys(("swin_l-vit_b16", "swin_l-resnet50d", "swin_l-vit_s16"), 5.0),
    **dict.fromkeys(("swin_l-swin_t", "eva_l-vit_b14", "eva_l-resnet50d"), 5.0),
    **dict.fromkeys(("swin_l-mixer_s16", "swin_l-mixer_b16", "eva_l-mixer_b14"), 1.0),
}
AVERAGED = {
    *("swin_l-vit_b16", "swin_l-vit_s16", "swin_l-convnext_t", "swin_l-swin_t"),
    *("swin_l-mixer_s16", "eva_l-mixer_b14", "eva_l-eva02_s"),
}
HARD_LABELS = {
    *("swin_l-resnet50", "swin_b-resnet50", "swin_s-resnet50"),
    *("swin_l-mixer_s16", "swin_l-mixer_b16"),
}
BCE = {"swin_l-resnet50d", "eva_l-resnet50d"}


def test_every_published_pair_has_a_recipe_and_no_other() -> None:
    assert set(recipe_names()) == set(PUBLISHED)
    assert {path.suffix for path in RECIPES.iterdir()} == {".yaml"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_resolves_to_the_published_values(name: str) -> None:
    config = train_config(name, {"output": "run"})
    opt, lr, decay, batch, heads3, heads4, scale, spatial, frequency = PUBLISHED[name]
    assert (config.opt, config.lr, config.weight_decay) == (opt, lr, decay)
    assert config.batch_size == batch
    assert config.clip_grad == CLIP.get(name)
    assert config.model_ema == (name in AVERAGED)
    assert config.wd_exclude == ("timm" if opt == "adamw" else "none")

    objective = config.objective_config
    stage3, stage4 = objective.stage3, objective.stage4
    assert (stage3.num_heads, stage4.num_heads) == (heads3, heads4)
    assert stage3.softmax_scale == stage4.softmax_scale == scale
    assert (stage3.spatial_weight, stage3.frequency_weight) == (spatial, frequency)
    without_frequency = name == "swin_s-resnet50"
    assert (stage4.spatial_weight, stage4.frequency_weight) == (
        spatial,
        0 if without_frequency else frequency,
    )
    assert (objective.kd_alpha, objective.temperature) == (0.5, 1)
    assert objective.kd != without_frequency
    assert objective.norm == ("layer" if name == "swin_l-swin_t" else "batch")
    assert not objective.self_query
    assert objective.task == ("bce" if name in BCE else "cross_entropy")
    smoothed = name not in HARD_LABELS | BCE
    assert objective.label_smoothing == (0.1 if smoothed else 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_names_things_that_exist(name: str) -> None:
    about = describe_recipe(name)
    resolve_model_name(about["teacher"])
    config = train_config(name, {"output": "run"})
    resolve_student_name(config.model)
    ViewPolicy.parse(about["augmentation"])
    optimizer = build_optimizer(config, nn.Linear(2, 2), nn.Identity())
    _, num_epochs = build_scheduler(config, optimizer, updates_per_epoch=10)
    assert num_epochs == about["epochs"]


def rates(name: str, epochs: list[float], updates_per_epoch: int = 100) -> list[float]:
    config = train_config(name, {"output": "run"})
    optimizer = build_optimizer(config, nn.Linear(2, 2), nn.Identity())
    scheduler, _ = build_scheduler(config, optimizer, updates_per_epoch=updates_per_epoch)
    assert scheduler is not None
    found = []
    for epoch in epochs:
        scheduler.step(int(epoch))
        scheduler.step_update(round(epoch * updates_per_epoch))
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_published_schedules() -> None:
    assert rates("swin_l-resnet50", [0, 29, 30, 60, 90, 99]) == pytest.approx(
        [0.1, 0.1, 0.01, 1e-3, 1e-4, 1e-4]
    )
    assert rates("swin_l-mobilenetv1", [0, 50]) == pytest.approx([0.1, 0.05])
    # 5 epochs up from a quarter of the rate, then a cosine over 295 epochs to 0.
    assert rates("swin_l-resnet50d", [0, 5, 5 + 295 / 2]) == pytest.approx([1.25e-3, 5e-3, 2.5e-3])
    # 20 epochs up, then from 1e-3 to 1e-5 over 280.
    assert rates("swin_l-vit_b16", [20, 20 + 280 / 4]) == pytest.approx(
        [1e-3, 1e-5 + 0.5 * 0.99e-3 * (1 + math.cos(math.pi / 4))]
    )


def test_nesterov_is_off_where_it_was() -> None:
    config = train_config("swin_l-resnet50", {"output": "run"})
    optimizer = build_optimizer(config, nn.Linear(2, 2), nn.Identity())
    assert isinstance(optimizer, torch.optim.SGD)
    assert not optimizer.param_groups[0]["nesterov"]
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_recipes_are_listed_with_the_papers_figures() -> None:
    shown = CliRunner().invoke(recipes_command.command, [], catch_exceptions=False).stdout
    line = next(row for row in shown.splitlines() if row.startswith("swin_l-resnet50d"))
    assert line.split() == [
        *("swin_l-resnet50d", "swin_l", "resnet50d", "300", "2048", "lamb", "0.005"),
        *("crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25", "82.03"),
    ]


def test_a_run_that_departs_from_its_recipe_says_in_what(sound_cache: Path) -> None:
    """The cache is a small ViT's; the published pair is Swin-L over 8 processes of 32 views."""
    config = train_config("swin_l-resnet50", {"cache": str(sound_cache), "output": "run"})
    batch, teacher = departures_from_recipe("swin_l-resnet50", config, world_size=1)
    assert "views an update is 256 as published, 32 here; its rate of 0.1 belongs to" in batch
    assert "the teacher is swin_large_patch4_window7_224 as published, test_vit here" in teacher
    larger = config.model_copy(update={"grad_accum_steps": 2})
    assert departures_from_recipe("swin_l-resnet50", larger, world_size=4) == [teacher]
    *_, views = departures_from_recipe("swin_l-mixer_b16", config, world_size=1)
    assert "the augmentation is crop+flip+rand-m8" in views
    assert departures_from_recipe("mine.yaml", config, world_size=1) == []
