"""``scalekd recipes NAME``: commands that do what the recipe says, figures that add up."""

import json
import shlex
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.recipe_flops import recipe_gflop
from scalekd.cli.cache_teacher import cache_teacher as cache_command
from scalekd.cli.commands import recipes as recipes_command
from scalekd.cli.train_student import train_student as train_command
from scalekd.errors import UsageError
from scalekd.pipelines._cache_options import CacheOptions
from scalekd.pipelines.configure import (
    departures_from_recipe,
    recipe_about,
    recipe_names,
    train_config,
)
from scalekd.pipelines.recipe_plan import RecipePlan, RecipePlanConfig, plan_recipe

NAMES = recipe_names()
SWITCHES: list[dict[str, Any]] = [{}, {"online": True}, {"baseline": True}, {"gpus": 1}]
SWITCHES.append({"online": True, "baseline": True})


def plan(name: str, **options: Any) -> RecipePlan:
    return plan_recipe(RecipePlanConfig(name=name, **options))


def parsed(command: Any, arguments: list[str]) -> dict[str, Any]:
    """The options that a printed command gives, read by the real command line."""
    start = arguments.index(command.name) + 1
    context = command.make_context(command.name, list(arguments[start:]))
    return dict(context.params)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gpus", [1, 2, 8, 32, 64])
def test_the_training_command_keeps_the_published_batch(name: str, gpus: int) -> None:
    options = parsed(train_command, plan(name, gpus=gpus).train_command)
    assert options.pop("recipe") == name
    given = {key: value for key, value in options.items() if value not in (None, (), False)}
    given.pop("cache")  # it is not there yet
    config = train_config(name, given)
    notes = departures_from_recipe(name, config, world_size=gpus)
    assert not [note for note in notes if "views an update" in note]
    assert set(given) <= {"data_dir", "output", "grad_accum_steps", "batch_size"}


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_command_has_the_views_and_the_teacher_of_the_recipe(name: str) -> None:
    about = recipe_about(name)
    options = parsed(cache_command, plan(name, passes=3).cache_command)
    for option, entry in {
        "model": "teacher",
        "img_size": "teacher_img_size",
        "aug": "augmentation",
        "interpolation": "interpolation",
    }.items():
        default = CacheOptions.model_fields[option].default if option == "interpolation" else None
        assert (options[option] or default) == about[entry]
    assert options["stages"] == (4,)
    assert (options["logits"] == "none") == (name == "swin_s-resnet50")  # the one without KD
    assert options["passes"] == 3


def test_fresh_views_and_baselines_are_one_switch_away() -> None:
    online = plan("swin_l-vit_s16", online=True)
    assert parsed(cache_command, online.cache_command)["stages"] == ()
    assert parsed(cache_command, online.cache_command)["passes"] == 1
    assert parsed(train_command, online.train_command)["online"]
    baseline = plan("swin_l-vit_s16", baseline=True)
    assert parsed(cache_command, baseline.cache_command)["logits"] == "none"
    assert parsed(train_command, baseline.train_command)["objective"] == "none"
    assert not [text for text in baseline.departures if "teacher" in text]
    both = plan("swin_l-vit_s16", baseline=True, online=True)
    assert both.cache_command == []  # fresh views need no teacher
    options = parsed(train_command, both.train_command)
    assert options["objective"] == "none"
    assert not options["cache"]
    assert not options["online"]
    assert options["aug"] == recipe_about("swin_l-vit_s16")["augmentation"]


def test_a_baseline_keeps_the_departures_that_are_not_of_the_teacher() -> None:
    baseline = plan("swin_l-resnet50d", baseline=True, online=True)
    assert baseline.departures == ["RandAugment has magnitude 9 (reference: 8.75)"]
    convnext = plan("swin_l-convnext_t", baseline=True, online=True).departures
    assert convnext == [
        "weight decay does not apply to the student's layer scale (reference: it does)"
    ]


def test_costs_add_up() -> None:
    # 1,281,167 images; Swin-L 69 GFLOP; ResNet-50-D alone 26, with ScaleKD 133.
    cost = plan("swin_l-resnet50d", gpus=8, passes=8, tflops=100).cost
    assert cost.cache_exaflop == pytest.approx(0.707, rel=1e-2)
    assert cost.train_exaflop == pytest.approx(51.1, rel=1e-2)
    assert cost.train_hours == pytest.approx(17.7, rel=1e-2)
    assert plan("swin_l-resnet50d", gpus=16).cost.train_hours == pytest.approx(8.87, rel=1e-2)
    online = plan("swin_l-resnet50d", online=True).cost
    assert online.cache_exaflop == 0
    assert online.train_exaflop == pytest.approx(51.1 + 26.5, rel=1e-2)
    alone = plan("swin_l-resnet50d", baseline=True).cost
    assert (alone.cache_exaflop, alone.train_exaflop) == (0, pytest.approx(9.99, rel=1e-2))


_QUICK = ("swin_l-resnet50", "eva_l-resnet50d")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in _QUICK else [pytest.mark.slow]) for n in NAMES],
)
def test_flops_are_those_of_the_models(name: str) -> None:
    assert recipe_gflop(name) == recipe_about(name)["gflop"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(recipes_command, [*arguments], catch_exceptions=False)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_fits_a_terminal_and_can_be_pasted(name: str) -> None:
    for options in SWITCHES:
        planned = plan(name, **options)
        lines = planned.lines()
        assert max(map(len, lines)) <= 80
        start = next(i for i, line in enumerate(lines) if line.startswith("#")) + 1
        printed = "\n".join(lines[start:]).replace("\\\n", " ").split("\n\n")
        commands = [planned.cache_command, planned.train_command]
        assert [shlex.split(text) for text in printed] == list(filter(None, commands))
        for text in planned.departures:
            assert text.partition(" (reference: ")[0] in "\n".join(lines)


def test_the_list_fits_a_terminal() -> None:
    lines = invoke().stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split() for line in lines}
    assert set(NAMES) <= set(rows)
    assert rows["swin_l-resnet50d"][5:] == ["82.03", "3.39", "yes"]
    assert rows["eva_l-eva02_s"][5:] == ["86.22", "-", "no"]


def test_json_of_one_and_of_all() -> None:
    (line,) = invoke("swin_l-vit_b16", "--gpus", "16", "--json").stdout.splitlines()
    found = json.loads(line)
    assert found["recipe"]["gain"] == 3.73
    assert found["recipe"]["teacher_model"] == "swin_large_patch4_window7_224.ms_in22k_ft_in1k"
    assert found["train_command"][:4] == ["torchrun", "--standalone", "--nproc-per-node", "16"]
    listed = json.loads(invoke("--json").stdout)["recipes"]
    assert [recipe["name"] for recipe in listed] == NAMES


def test_fewer_gpus_than_published_say_what_batch_norm_sees() -> None:
    seen = "batch norm sees 64 views on 2 GPUs (reference: 256)"
    assert seen in plan("swin_s-resnet50", gpus=2).departures
    assert not [t for t in plan("swin_s-resnet50", gpus=8).departures if "batch norm" in t]
    assert not [t for t in plan("swin_l-mixer_b16", gpus=2).departures if "batch norm" in t]


def test_other_batches_than_published_say_what_batch_norm_sees() -> None:
    seen = "batch norm sees 32 views on 64 GPUs (reference: 64)"
    assert seen in plan("swin_l-resnet50d", gpus=64).departures
    assert seen in plan("swin_l-resnet50d", gpus=64, baseline=True).departures
    # The projectors' batch norms, where the student has none; layer norm has no batch.
    projectors = "batch norm sees 16 views on 64 GPUs (reference: 32)"
    assert projectors in plan("swin_l-vit_s16", gpus=64).departures
    for other in (plan("swin_l-vit_s16", gpus=64, baseline=True), plan("swin_l-swin_t", gpus=64)):
        assert not [t for t in other.departures if "batch norm" in t]
    # Synchronised: smaller batches on more GPUs are the same batch.
    assert not [t for t in plan("swin_l-resnet50", gpus=16).departures if "batch norm" in t]


def test_reused_views_are_a_departure() -> None:
    assert [t for t in plan("swin_l-vit_s16", passes=8).departures if "trained on 37.5 times" in t]
    for options in ({"passes": 300}, {"online": True}):
        assert not [t for t in plan("swin_l-vit_s16", **options).departures if "times" in t]


def test_an_impossible_plan_is_refused() -> None:
    with pytest.raises(UsageError, match=r"swin_l-resnet5x: neither.*swin_l-resnet50"):
        plan("swin_l-resnet5x")
    with pytest.raises(UsageError, match=r"--gpus 7: swin_l-resnet50 makes an update of 256"):
        plan("swin_l-resnet50", gpus=7)
    with pytest.raises(UsageError, match="--baseline: plans one recipe; name it"):
        invoke("--baseline")
    with pytest.raises(UsageError, match="--gpus"):
        invoke("swin_l-resnet50", "--gpus", "0")
