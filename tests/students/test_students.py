"""Students give timm's own logits and the two levels of the reference, in one forward."""

import copy
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from scalekd.errors import UsageError
from scalekd.models.levels import find_levels
from scalekd.students import Student, StudentSpec, create_student
from scalekd.training import freeze_parameters

# The paper's students at their real widths and a small image size, with the levels that golden
# README section 3 states: (channels, downsampling) of the third and fourth stage.
PAPER = {
    "resnet50": ((1024, 16), (2048, 32)),
    "resnet50d": ((1024, 16), (2048, 32)),
    "mobilenetv1_100": ((512, 16), (1024, 32)),
    "convnext_tiny": ((384, 16), (768, 32)),
    "mixer_s16_224": ((512, 16), (512, 16)),
    "mixer_b16_224": ((768, 16), (768, 16)),
    "vit_small_patch16_224": ((384, 16), (384, 16)),
    "vit_base_patch16_224": ((768, 16), (768, 16)),
    "swin_tiny_patch4_window7_224": ((384, 16), (768, 32)),
}
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("test_resnet", {}),
    ("test_efficientnet", {}),  # its classifier pools features wider than the last block
    ("test_convnext", {}),
    ("test_vit", {"drop_rate": 0.3, "drop_path_rate": 0.3}),
    (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 2, 4]},
    ),
    ("mixer_s32_224", {"drop_path_rate": 0.3}),
    ("deit_tiny_distilled_patch16_224", {"depth": 4, "embed_dim": 32, "num_heads": 2}),
    ("eva02_tiny_patch14_224", {"depth": 4, "embed_dim": 32, "num_heads": 2}),
    ("pvt_v2_b0", {}),
    ("mambaout_femto", {}),  # NHWC inside
    ("crossvit_9_240", {}),  # two branches of tokens
]


def _images(student: Student, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((batch, 3, *student.spec.img_size), generator=generator)


@pytest.mark.parametrize("name", PAPER)
@torch.no_grad()
def test_the_papers_students_have_the_reference_levels(name: str) -> None:
    student = create_student(name, num_classes=10, img_size=64).eval()
    images = _images(student, 1)
    logits, levels = student(images)
    assert torch.equal(logits, student.model(images))
    for level, spec, (channels, reduction) in zip(
        levels, student.spec.levels, PAPER[name], strict=True
    ):
        assert spec.num_channels == channels
        assert spec.grid == (64 // reduction, 64 // reduction)
        assert level.shape == (1, channels, *spec.grid)


@pytest.mark.parametrize(("name", "kwargs"), SMALL, ids=[name for name, _ in SMALL])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_equal_timms_in_both_modes(name: str, kwargs: dict[str, Any], mode: str) -> None:
    student = create_student(name, num_classes=5, model_kwargs=kwargs).train(mode == "train")
    images = _images(student)
    twin = copy.deepcopy(student.model)
    torch.manual_seed(1)
    logits, levels = student(images)
    torch.manual_seed(1)
    assert torch.equal(logits, twin(images))
    for ours, theirs in zip(student.model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)  # batch norm saw the batch once
    for level, spec in zip(levels, student.spec.levels, strict=True):
        assert level.shape == (2, spec.num_channels, *spec.grid)


def test_every_parameter_learns_from_the_logits_alone() -> None:
    """DistributedDataParallel waits for ever on a parameter that takes no part."""
    for name, kwargs in SMALL:
        student = create_student(name, num_classes=5, model_kwargs=kwargs)
        student(_images(student)).logits.sum().backward()
        assert [n for n, p in student.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_resnet_levels_are_what_enters_and_leaves_its_last_stage() -> None:
    student = create_student("test_resnet", num_classes=5).eval()
    third, fourth = student(_images(student)).levels
    assert (third >= 0).all()
    assert (fourth >= 0).all()  # after the block's ReLU
    assert torch.equal(student.model.layer4(third), fourth)
    assert torch.equal(student.model.forward_head(fourth), student(_images(student)).logits)


@torch.no_grad()
def test_vit_levels_are_block_nine_of_twelve_raw_and_the_normed_last_without_class_token() -> None:
    kwargs = {"depth": 12, "embed_dim": 24, "num_heads": 2}
    student = create_student(
        "vit_small_patch16_224", num_classes=5, img_size=64, model_kwargs=kwargs
    )
    model, images = student.eval().model, _images(student)
    third, fourth = student(images).levels

    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    after = []
    for block in model.blocks:
        x = block(x)
        after.append(x)
    assert torch.equal(third.flatten(2).transpose(1, 2), after[8][:, 1:])
    assert torch.equal(fourth.flatten(2).transpose(1, 2), model.norm(after[11])[:, 1:])


@pytest.mark.parametrize(
    ("name", "indices"), [("mixer_b16_224", (9, 11)), ("mixer_s16_224", (5, 7))]
)
@torch.no_grad()
def test_mixer_levels_are_the_references_blocks_before_the_final_norm(
    name: str, indices: tuple[int, int]
) -> None:
    student = create_student(name, num_classes=5, img_size=32)
    model, images = student.eval().model, _images(student)
    levels = student(images).levels
    x, after = model.stem(images), []
    for block in model.blocks:
        x = block(x)
        after.append(x)
    for level, index in zip(levels, indices, strict=True):
        assert torch.equal(level.flatten(2).transpose(1, 2), after[index])


@torch.no_grad()
def test_swin_levels_are_maps_row_by_row_and_the_last_is_normed() -> None:
    kwargs = {"embed_dim": 12, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 2, 4]}
    student = create_student(
        "swin_tiny_patch4_window7_224", num_classes=5, img_size=(96, 160), model_kwargs=kwargs
    ).eval()
    third, fourth = student(_images(student)).levels
    assert (third.shape[2:], fourth.shape[2:]) == ((6, 10), (3, 5))
    model = student.model
    again = model.norm(model.layers[-1](third.permute(0, 2, 3, 1)))
    assert torch.allclose(again.permute(0, 3, 1, 2), fourth, atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_bfloat16_and_channels_last_keep_the_shapes(name: str) -> None:
    student = create_student(name, num_classes=5).to(memory_format=torch.channels_last)
    images = _images(student).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, levels = student(images)
    assert logits.dtype == torch.bfloat16
    for level, spec in zip(levels, student.spec.levels, strict=True):
        assert level.shape == (2, spec.num_channels, *spec.grid)
    (logits.float().sum() + sum(level.float().sum() for level in levels)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_the_seed_determines_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(create_student("test_resnet", num_classes=5).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_spec_round_trips_through_json() -> None:
    student = create_student(
        "resnet18",
        num_classes=10,
        img_size=64,
        model_kwargs={"drop_rate": 0.1},
        mean=(0.1, 0.2, 0.3),
    )
    spec = student.spec
    assert StudentSpec.model_validate_json(spec.model_dump_json()) == spec
    assert (spec.architecture, spec.img_size, spec.num_classes) == ("resnet18", (64, 64), 10)
    assert (spec.mean, spec.model_kwargs) == ((0.1, 0.2, 0.3), {"drop_rate": 0.1})
    assert [(level.num_channels, level.grid) for level in spec.levels] == [
        (256, (4, 4)),
        (512, (2, 2)),
    ]
    assert all(module.training for module in student.modules())


def test_weights_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    first = create_student("test_resnet", num_classes=5)
    torch.save(
        {"state_dict": {f"_orig_mod.{k}": v for k, v in first.model.state_dict().items()}},
        tmp_path / "c.pth",
    )
    again = create_student("test_resnet", num_classes=5, checkpoint=tmp_path / "c.pth")
    images = _images(first)
    assert torch.equal(first.eval()(images).logits, again.eval()(images).logits)


def test_a_folder_timm_exported_is_a_student(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=4, img_size=96).eval()
    timm.models.save_for_hf(model, tmp_path / "run", safe_serialization=True)
    student = create_student(f"local-dir:{tmp_path / 'run'}", num_classes=4, pretrained=True).eval()
    images = _images(student)
    assert student.spec.img_size == (96, 96)
    assert torch.equal(student(images).logits, model(images))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet5", {}, "did you mean resnet50"),
        ("test_vit", {"img_size": 1}, "cannot be a student at 1 x 1 px"),
        ("test_resnet", {"model_kwargs": {"depth": 3}}, "has no argument 'depth'"),
        ("test_resnet", {"model_kwargs": {"pretrained": True}}, "'pretrained' cannot be set"),
        ("test_resnet", {"num_classes": -1}, "cannot have num_classes=-1"),
        ("mixer_s16_224", {"model_kwargs": {"num_blocks": 3}}, "fixes 'num_blocks' itself"),
        ("test_vit", {"model_kwargs": {"patch_drop_rate": 0.5}}, "patch_drop_rate"),
        ("test_vit", {"checkpoint": "nowhere.safetensors"}, "there is no such file"),
    ],
)
def test_an_impossible_student_is_refused_with_a_reason(
    name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError) as raised:
        create_student(name, **{"num_classes": 3, **options})
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize(("was", "now"), [(0, 3), (5, 3), (5, 0)])
def test_a_folder_need_not_name_its_classifier(
    name: str, was: int, now: int, tmp_path: Path
) -> None:
    original = timm.create_model(name, num_classes=was)
    timm.models.save_for_hf(original, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["pretrained_cfg"]["classifier"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    notes: list[str] = []
    student = create_student(
        f"local-dir:{tmp_path / 'run'}",
        num_classes=now,
        pretrained=True,
        new_head=None,
        notes=notes,
    )
    ours, theirs = student.model.state_dict(), original.state_dict()
    head = {key for key in ours if key not in theirs or ours[key].shape != theirs[key].shape}
    assert len(head) == (2 if now else 0)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in head)
    assert len(notes) == bool(head)
    freeze_parameters(student.model, ("backbone",) if now else ())
    trained = {key for key, value in student.model.named_parameters() if value.requires_grad}
    assert not now or trained == head


def test_a_model_without_inner_features_is_refused() -> None:
    with pytest.raises(UsageError, match="no access to its inner features"):
        find_levels(torch.nn.Linear(1, 1), "linear", (8, 8))


def test_creating_a_student_opens_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    create_student("test_vit", num_classes=3)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_efficientnet", "mixer_s32_224"])
def test_pooled_features_are_those_before_the_classifier(model: str) -> None:
    student = create_student(model, num_classes=3, img_size=64 if "test" in model else 224).eval()
    images = torch.randn(2, 3, *student.spec.img_size)
    output = student(images, pooled=True)
    assert output.pooled.shape == (2, student.num_features())
    torch.testing.assert_close(student.model.get_classifier()(output.pooled), output.logits)


def test_a_student_without_classes_returns_its_pooled_features() -> None:
    student = create_student("test_resnet", num_classes=0, img_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    output = student(images, pooled=True)
    assert student.spec.num_classes == 0
    assert torch.equal(output.pooled, student.model(images))
    assert output.pooled.shape == (2, student.model.num_features)


def test_a_student_runs_under_distributed_data_parallel(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        student = create_student("test_vit", num_classes=3)
        parallel = torch.nn.parallel.DistributedDataParallel(student)
        for _ in range(2):  # a parameter left out of the first step would fail the second
            logits, levels = parallel(_images(student))
            (logits.sum() + levels[0].sum() + levels[1].sum()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in student.parameters())
