"""Every published pair, entry by entry, against the settings of the authors' implementation."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from scalekd.pipelines.configure import (
    RECIPES,
    departures_from_recipe,
    describe_recipe,
    recipe_about,
    recipe_names,
    train_config,
)
from scalekd.students import Student, create_student
from scalekd.teachers import resolve_model_name
from scalekd.training import TrainConfig, build_optimizer, build_scheduler, parameter_groups
from scalekd.views import Erase, Flip, RandAugment, RandomCrop, ViewPolicy

REFERENCE: dict[str, Any] = {
    name: settings
    for name, settings in json.loads(
        (Path(__file__).parent / "recipes_reference.json").read_text()
    ).items()
    if not name.startswith("_")
}
OURS = {"swin_s-resnet50-kd": "swin_s-resnet50"}  # and the reference that it varies
OPTIMIZERS = {"AdamW": "adamw", "Lamb": "lamb", "SGD": "momentum"}
FILTERS = {"bicubic": "bicubic", "bilinear": "bilinear-opencv"}  # OpenCV does the latter there
TEACHERS = {
    "swin_large_patch4_window7_224_22kto1k": "swin_large_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_base_patch4_window7_224_22kto1k": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_small_patch4_window7_224": "swin_small_patch4_window7_224.ms_in1k",
    "eva-l-p14_mim-in21k-pre_3rdparty_in1k-196px": "eva_large_patch14_196.in22k_ft_in22k_in1k",
    "eva-l-p14_mim-in21k-pre_3rdparty_in1k-336px": "eva_large_patch14_336.in22k_ft_in22k_in1k",
}
PUBLISHED = {  # top-1 of the student, and trained alone: paper, table 3
    "swin_l-mobilenetv1-lamb": (75.15, 72.10),
    "swin_l-resnet50d": (82.03, 78.64),
    "swin_l-convnext_t": (84.16, 82.14),
    "swin_l-mixer_s16": (78.63, 74.02),
    "swin_l-mixer_b16": (81.96, 76.44),
    "swin_l-vit_s16": (83.93, 79.90),
    "swin_l-swin_t": (83.80, 81.18),
    "swin_l-vit_b16": (85.53, 81.80),
    "eva_l-resnet50d": (82.34, 78.64),
    "eva_l-mixer_b14": (82.89, 76.62),
    "eva_l-vit_b14": (86.43, 82.02),
    "eva_l-eva02_s": (86.22, None),
}


def config_of(name: str) -> TrainConfig:
    return train_config(name, {"output": "run"})


def departures(name: str) -> str:
    return "; ".join(recipe_about(name)["departures"])


class Built(NamedTuple):
    """A recipe's student, as train-student makes it."""

    name: str
    config: TrainConfig
    reference: dict[str, Any]
    student: Student


_LARGE = ("vit_b", "mixer_b", "eva02", "swin_b-resnet50", "swin_s-resnet50", "eva_l-resnet50d")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if any(part in name for part in _LARGE) else [])
        for name in [*REFERENCE, *OURS]
    ],
)
def built(request: pytest.FixtureRequest) -> Built:
    name = str(request.param)
    config = config_of(name)
    kwargs = dict(config.model_kwargs)
    if config.drop_path is not None:
        kwargs["drop_path_rate"] = config.drop_path
    torch.manual_seed(0)
    student = create_student(
        config.model,
        num_classes=1000,
        img_size=config.img_size,
        model_kwargs=kwargs,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        interpolation=config.interpolation,
    )
    return Built(name, config, REFERENCE[OURS.get(name, name)], student)


def test_every_pair_of_the_reference_has_a_recipe() -> None:
    assert set(recipe_names()) == set(REFERENCE) | set(OURS)
    assert {path.suffix for path in RECIPES.iterdir()} == {".yaml"}
    for name in recipe_names():
        assert (recipe_about(name)["reference"] is None) == (name in OURS)


@pytest.mark.parametrize("name", REFERENCE)
def test_optimisation_agrees_with_the_reference(name: str) -> None:
    config, reference = config_of(name), REFERENCE[name]
    assert config.opt == OPTIMIZERS[reference["opt"]]
    for entry in ("lr", "weight_decay", "clip_grad"):
        assert getattr(config, entry) == reference[entry], entry
    assert config.batch_size == reference["batch_per_gpu"]
    assert (config.grad_accum_steps, config.clip_mode) == (1, "norm")
    assert (config.drop_path or 0) == reference["drop_path"]
    assert config.model_ema == (reference["ema_decay"] is not None)
    if config.model_ema:
        assert config.model_ema_decay == reference["ema_decay"]
        assert not config.model_ema_warmup
    assert config.sync_bn == reference["sync_bn"]
    assert config.amp == "no"
    optimizer = build_optimizer(config, nn.Linear(2, 2), nn.Identity())
    for entry in ("momentum", "betas", "eps"):
        if entry in reference:
            wanted = reference[entry]
            assert optimizer.param_groups[0][entry] == (
                tuple(wanted) if isinstance(wanted, list) else wanted
            )
    assert not optimizer.param_groups[0].get("nesterov", False)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_learning_rate_agrees_with_the_reference(name: str) -> None:
    reference, updates = REFERENCE[name], 1000
    config = config_of(name)
    optimizer = build_optimizer(config, nn.Linear(2, 2), nn.Identity())
    scheduler, num_epochs = build_scheduler(config, optimizer, updates_per_epoch=updates)
    assert scheduler is not None
    assert num_epochs == reference["max_epochs"] == recipe_about(name)["epochs"]
    warmup = reference["warmup_epochs"]
    for epoch in (0, 1, warmup / 2, warmup, 29, 30, 60, 75, 90, 99, num_epochs - 1):
        epoch = int(epoch)
        if epoch < warmup:
            start = reference["warmup_start_lr"]
            wanted = start + (reference["lr"] - start) * epoch / warmup
        elif reference["schedule"] == "MultiStepLR":
            passed = sum(epoch >= milestone for milestone in reference["milestones"])
            wanted = reference["lr"] * reference["gamma"] ** passed
        else:
            low = reference["min_lr"]
            angle = math.pi * (epoch - warmup) / (num_epochs - warmup)
            wanted = low + (reference["lr"] - low) * (1 + math.cos(angle)) / 2
        scheduler.step(epoch)
        scheduler.step_update(epoch * updates)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", REFERENCE)
def test_losses_agree_with_the_reference(name: str) -> None:
    config, reference = config_of(name), REFERENCE[name]
    objective = config.objective_config
    assert config.objective == "scalekd"
    for ours, stage in ((objective.stage3, "stage3"), (objective.stage4, "stage4")):
        wanted = reference[stage]
        assert ours.num_heads == wanted["heads"]
        assert [ours.spatial_weight, ours.frequency_weight] == wanted["weights"]
        assert [ours.softmax_scale, ours.softmax_scale] == wanted["softmax_scale"]
    assert objective.kd == reference["kd"]["used"]
    assert objective.kd_alpha == reference["kd"]["alpha"]
    assert objective.temperature == reference["kd"]["temperature"]
    assert objective.label_smoothing == reference["label_smoothing"]
    assert objective.task == ("bce" if reference["bce"] else "cross_entropy")
    assert objective.norm == ("layer" if name == "swin_l-swin_t" else "batch")
    assert not objective.self_query


@pytest.mark.parametrize("name", REFERENCE)
def test_views_agree_with_the_reference(name: str) -> None:
    config, reference = config_of(name), REFERENCE[name]
    policy = ViewPolicy.parse(
        recipe_about(name)["augmentation"], interpolation=recipe_about(name)["interpolation"]
    )
    assert (policy.geometry, policy.component(Flip)) == (RandomCrop(), Flip(0.5))
    assert policy.component(Erase) == (Erase(reference["erase"]) if reference["erase"] else None)
    assert policy.interpolation == FILTERS[reference["train_interpolation"]]
    rand = reference["randaugment"]
    if rand is None:
        assert policy.component(RandAugment) is None
    else:
        assert policy.component(RandAugment) == RandAugment(
            magnitude=round(rand["magnitude_of_10"]),
            num_operations=rand["num"],
            magnitude_std=rand["std"],
            increasing=True,
        )
        whole = rand["magnitude_of_10"] == round(rand["magnitude_of_10"])
        assert whole != (f"(reference: {rand['magnitude_of_10']})" in departures(name))
    assert config.img_size == reference["img_size"]
    evaluation = reference["eval"]
    assert math.floor(config.img_size / (config.crop_pct or 0)) == evaluation["resize_edge"]
    assert config.img_size == evaluation["crop"]
    assert config.interpolation == FILTERS[evaluation["interpolation"]]


@pytest.mark.parametrize("name", REFERENCE)
def test_the_teacher_is_that_of_the_reference(name: str) -> None:
    reference = REFERENCE[name]
    weights = reference["teacher_weights"].rpartition("-")[0].removesuffix("_20221213")
    assert resolve_model_name(recipe_about(name)["teacher"])[0] == TEACHERS[weights]
    assert recipe_about(name)["teacher_img_size"] == reference["teacher"]["img_size"]
    is_swin = reference["teacher"]["type"] == "SwinTransformer"
    depth = reference["teacher"].get("drop_path_rate", 0.1)  # 0.1 is the class's own
    assert is_swin == (f"stochastic depth {depth:g})" in departures(name))


def test_the_student_is_that_of_the_reference(built: Built) -> None:
    _, _, reference, student = built
    wanted = reference["student"]
    model: Any = student.model
    assert type(model).__name__.lower() == {
        "ResNetV1d": "resnet",
        "MobileNetV1": "efficientnet",
        "ViTEVA02": "eva",
    }.get(wanted["type"], wanted["type"].lower())
    assert student.spec.img_size == (reference["img_size"],) * 2
    assert student.spec.mean == (0.485, 0.456, 0.406)
    assert student.spec.std == (0.229, 0.224, 0.225)
    if "patch_size" in wanted:
        side = reference["img_size"] // wanted["patch_size"]
        assert student.spec.levels[1].grid == (side, side)
    if "with_cls_token" in wanted:
        assert (model.cls_token is None) == (not wanted["with_cls_token"])
        assert isinstance(model.norm, nn.LayerNorm)
        assert isinstance(model.fc_norm, nn.Identity)
    if wanted.get("sub_ln"):
        assert isinstance(model.blocks[0].mlp.norm, nn.LayerNorm)
    if wanted["type"] == "MobileNetV1":
        kinds = {type(part) for part in model.modules()}
        assert nn.ReLU in kinds
        assert nn.ReLU6 not in kinds
    if wanted["type"] == "ResNetV1d":
        assert len([part for part in model.conv1 if isinstance(part, nn.Conv2d)]) == 3
    rates = [float(getattr(part, "drop_prob", 0) or 0) for part in model.modules()]
    assert max(rates) == pytest.approx(reference["drop_path"])


def test_weight_decay_agrees_with_the_reference(built: Built) -> None:
    name, config, reference, whole = built
    student = whole.model
    groups = parameter_groups(
        student,
        nn.Identity(),
        lr=config.lr,
        weight_decay=config.weight_decay,
        wd_exclude=config.wd_exclude,
    )
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    free, keys = reference["no_decay"], reference["no_decay"]["keys"]
    norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    of_norms = {
        id(p)
        for part in student.modules()
        if isinstance(part, norms)
        for p in part.parameters(recurse=False)
    }
    num_checked = 0
    for path, parameter in student.named_parameters():
        if path in ("pos_embed", "cls_token") and f".{path}" not in keys and free["norms"]:
            assert "position embeddings and class token (reference: it does)" in departures(name)
            continue
        is_bias = path.endswith("bias")
        exempt = (
            (free["norms"] and id(parameter) in of_norms)
            or (free["biases"] and is_bias)
            or any(key in f".{path}" for key in keys)
        )
        if free["norms"] and path.endswith("gamma"):  # ConvNeXt's layer scale, a vector
            assert decays[id(parameter)] == 0
            assert "the student's layer scale (reference: it does)" in departures(name)
            continue
        assert decays[id(parameter)] == (0 if exempt else reference["weight_decay"]), path
        num_checked += 1
    assert num_checked > 60


def classifies_level4(student: Student) -> bool:
    """Whether the logits are the classifier's of the pooled map that is distilled."""
    model: Any = student.model.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *student.spec.img_size, generator=generator)
    classifier = model.get_classifier()
    nn.init.normal_(classifier.weight)  # some architectures begin with zeros
    with torch.no_grad():
        logits, levels = student(images)
        ours = classifier(levels[1].mean(dim=(2, 3)))
    assert float(logits.std()) > 0.1
    return torch.allclose(logits, ours, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_the_map_that_is_distilled_is_classified(built: Built) -> None:
    """As in the reference, where only Mixers and EVA-02 have a norm between the two."""
    norm_between = built.reference["student"]["type"] in ("MlpMixer", "ViTEVA02")
    assert classifies_level4(built.student) != norm_between


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "convnext_atto"])
def test_without_the_recipes_arguments_another_map_is_classified(model: str) -> None:
    torch.manual_seed(0)
    student = create_student(model, num_classes=10, img_size=64)
    for part in student.model.modules():  # so that norms do more than their first values
        if isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight)
    assert not classifies_level4(student)


def test_the_page_of_departures_has_those_of_every_recipe() -> None:
    page = (Path(__file__).parents[2] / "docs" / "departures.md").read_text().casefold()
    for name in recipe_names():
        for text in recipe_about(name)["departures"]:
            assert text.partition(" (reference: ")[0].casefold() in page


def test_published_figures() -> None:
    for name in recipe_names():
        assert (recipe_about(name)["top1"], recipe_about(name)["top1_alone"]) == PUBLISHED.get(
            name, (None, None)
        )


def test_teachers_of_three_sizes_are_compared_by_one_method() -> None:
    large, base, small = (
        config_of(name).model_dump(exclude={"recipe"})
        for name in ("swin_l-resnet50", "swin_b-resnet50", "swin_s-resnet50-kd")
    )
    for config in (large, base, small):
        for stage in ("stage3", "stage4"):
            config["distillation"][stage].pop("num_heads")  # a third of the channels a head, or so
    assert large == base == small


def test_a_recipe_may_write_no_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: resnet18\namp: no\n")
    assert train_config(str(tmp_path / "mine.yaml"), {"output": "run"}).amp == "no"


def test_a_run_that_departs_from_its_recipe_says_in_what(sound_cache: Path) -> None:
    """The cache is a small ViT's; the published pair is Swin-L over 8 processes of 32 views."""
    config = train_config("swin_l-resnet50", {"cache": str(sound_cache), "output": "run"})
    notes = departures_from_recipe("swin_l-resnet50", config, world_size=1)
    method, batch, norm, teacher, size, interpolation = notes
    assert "eval mode (reference: with stochastic depth 0.1)" in method
    assert "docs/departures.md" in method
    assert "views an update is 256 as published, 32 here; its rate of 0.1 belongs to" in batch
    assert "the number of views that batch norm sees is 256 as published, 32 here" in norm
    assert "the teacher is swin_large_patch4_window7_224 as published, test_vit here" in teacher
    assert "image size is 224 x 224 px as published, 32 x 32 px here" in size
    assert "--img-size 224" in size
    assert "is bilinear-opencv as published, bicubic here" in interpolation
    larger = config.model_copy(update={"grad_accum_steps": 2})
    assert departures_from_recipe("swin_l-resnet50", larger, world_size=4) == [
        note.replace("32 here", "128 here") if note == norm else note
        for note in notes
        if note != batch
    ]
    assert departures_from_recipe("swin_l-resnet50", config, world_size=8) == [
        note for note in notes if note not in (batch, norm)
    ]
    other = departures_from_recipe("swin_l-mixer_b16", config, world_size=1)
    assert any("the augmentation is crop+flip+rand-m8" in note for note in other)
    assert departures_from_recipe("mine.yaml", config, world_size=1) == []


def test_a_baseline_has_no_teacher_to_depart_from(sound_cache: Path) -> None:
    config = train_config(
        "swin_l-resnet50", {"cache": str(sound_cache), "output": "run", "objective": "none"}
    )
    notes = departures_from_recipe("swin_l-resnet50", config, world_size=8)
    assert not [note for note in notes if "teacher" in note]
    objective, interpolation = notes
    assert "objective is 'none' here ('scalekd' as published)" in objective
    assert "bilinear-opencv" in interpolation


def test_a_baseline_without_a_cache_has_the_views_of_its_recipe_or_says_so() -> None:
    name = "swin_l-resnet50d"

    def notes(**flags: Any) -> list[str]:
        flags = {"output": "run", "data_dir": "d", "objective": "none", **flags}
        return departures_from_recipe(name, train_config(name, flags), world_size=32)

    wanted = recipe_about(name)["augmentation"]
    method, objective, augmentation = notes()
    assert "RandAugment has magnitude 9" in method
    assert "eval mode" not in method
    assert "objective is 'none' here" in objective
    assert f"augmentation is {wanted} as published, crop+flip here; give --aug" in augmentation
    assert notes(aug=wanted) == [method, objective]


def test_a_batch_of_another_size_changes_what_batch_norm_sees() -> None:
    def views(name: str, **flags: Any) -> list[str]:
        config = train_config(name, {"output": "run", **flags})
        notes = departures_from_recipe(name, config, world_size=8)
        return [note for note in notes if "batch norm sees" in note]

    assert views("swin_l-resnet50d", grad_accum_steps=4) == []
    (note,) = views("swin_l-resnet50d", batch_size=256)
    assert "is 64 as published, 256 here" in note
    assert views("swin_l-resnet50") == []
    (note,) = views("swin_l-resnet50", sync_bn=False)
    assert "is 256 as published, 32 here" in note
    (note,) = views("swin_l-vit_s16", batch_size=128)  # the projectors'
    assert "is 32 as published, 128 here" in note
    assert views("swin_l-swin_t", batch_size=64) == []


def changes_of(name: str, **flags: Any) -> list[str]:
    config = train_config(name, {"output": "run", **flags})
    notes = departures_from_recipe(name, config, world_size=recipe_about(name)["processes"])
    return [note for note in notes if "as published)" in note]


def test_options_that_change_a_recipe_are_named() -> None:
    assert changes_of("swin_l-vit_s16") == []
    launch = {"cache": None, "data_dir": "d", "seed": 3, "workers": 0, "log_interval": 1}
    assert changes_of("swin_l-vit_s16", **launch, channels_last=True, online=True) == []
    (line,) = changes_of("swin_l-vit_s16", epochs=1, lr=0.1)
    assert "epochs is 1 here (280 as published); lr is 0.1 here (0.001 as published)" in line
    for option, value in (("amp", "bf16"), ("crop_pct", 0.9), ("pretrained", True)):
        (line,) = changes_of("swin_l-vit_s16", **{option: value})
        assert f"{option} is {value!r} here" in line
    (line,) = changes_of("swin_l-vit_s16", distillation=[("temperature", 2.0)])
    assert "'temperature': 2.0" in line


def test_model_arguments_are_added_to_those_of_the_recipe() -> None:
    def kwargs(**flags: Any) -> dict[str, Any]:
        return train_config("swin_l-vit_s16", {"output": "run", **flags}).model_kwargs

    own = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    assert kwargs() == own
    assert kwargs(model_kwargs={"drop_rate": 0.1}) == {**own, "drop_rate": 0.1}
    assert kwargs(model_kwargs={"class_token": True}) == {**own, "class_token": True}
    # Another student does not know them.
    assert kwargs(model="resnet50") == {}
    assert kwargs(model="resnet50", model_kwargs={"zero_init_last": False}) == {
        "zero_init_last": False
    }


def test_a_recipe_of_ours_says_that_it_was_not_released() -> None:
    config = config_of("swin_s-resnet50-kd")
    first, *_ = departures_from_recipe("swin_s-resnet50-kd", config, world_size=8)
    assert "not released by the authors" in first


def test_the_description_names_batch_and_rate() -> None:
    described = describe_recipe("swin_l-vit_b16")
    assert (described["batch"], described["opt"], described["lr"]) == (512, "adamw", 1e-3)
