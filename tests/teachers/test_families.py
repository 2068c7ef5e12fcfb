"""Every family: one forward gives timm's own features and logits, and the tail repeats them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.teachers import Teacher, TeacherConfig, load_tail, load_teacher, save_tail

_TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
_SWIN = {"embed_dim": 12, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 2, 4], "num_classes": 7}


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    img_size: tuple[int, int] | None = None
    prefix: int = 0
    grids: tuple[tuple[int, int], tuple[int, int]] = ((4, 4), (4, 4))
    tail_blocks: int = 2

    def __str__(self) -> str:
        return self.name


def _vit(name: str, model: str, prefix: int = 1, **kwargs: Any) -> Case:
    return Case(name, model, {**_TINY, "patch_size": 16, **kwargs}, (64, 64), prefix)


CASES = [
    Case("swin-224", "swin_tiny_patch4_window7_224", _SWIN, None, 0, ((14, 14), (7, 7))),
    Case(
        "swin-96-smaller-than-window",
        "swin_tiny_patch4_window7_224",
        _SWIN,
        (96, 96),
        0,
        ((6, 6), (3, 3)),
    ),
    Case("swin-odd-grids", "swin_tiny_patch4_window7_224", _SWIN, (112, 144), 0, ((7, 9), (4, 5))),
    Case(
        "swin-shifted-last-stage",
        "swin_tiny_patch4_window7_224",
        {**_SWIN, "window_size": 4},
        (192, 192),
        0,
        ((12, 12), (6, 6)),
    ),
    Case(
        "swinv2",
        "swinv2_tiny_window8_256",
        {**_SWIN, "window_size": 4},
        (128, 128),
        0,
        ((8, 8), (4, 4)),
    ),
    Case(
        "swinv2-shifted-last-stage",
        "swinv2_tiny_window8_256",
        {**_SWIN, "window_size": 4},
        (256, 192),
        0,
        ((16, 12), (8, 6)),
    ),
    _vit("vit", "vit_small_patch16_224"),
    _vit("vit-average-pool", "vit_small_patch16_224", global_pool="avg"),
    _vit("vit-average-pool-final-norm", "vit_small_patch16_224", global_pool="avg", fc_norm=False),
    _vit("vit-map-pool", "vit_small_patch16_224", global_pool="map"),
    _vit("vit-no-class-token", "vit_small_patch16_224", 0, class_token=False, global_pool="avg"),
    _vit("vit-clip-pre-norm", "vit_base_patch16_clip_224"),
    _vit("vit-qk-norm", "vit_small_patch16_224", qk_norm=True, init_values=0.1),
    _vit("vit-dynamic-size", "vit_small_patch16_224", dynamic_img_size=True),
    Case("vit-test-model", "test_vit", {}, None, 1, ((10, 10), (10, 10))),
    Case("vit-oblong", "vit_small_patch16_224", _TINY, (64, 96), 1, ((4, 6), (4, 6)), 3),
    _vit("deit-distilled", "deit_small_distilled_patch16_224", 2),
    _vit("deit3", "deit3_small_patch16_224"),
    _vit("dinov2", "vit_small_patch14_dinov2"),
    _vit("dinov2-registers", "vit_small_patch14_reg4_dinov2", 5),
    _vit("beit", "beit_base_patch16_224"),
    _vit("beitv2", "beitv2_base_patch16_224"),
    _vit(
        "beit-shared-bias",
        "beit_base_patch16_224",
        use_shared_rel_pos_bias=True,
        use_rel_pos_bias=False,
    ),
    Case("beit-oblong", "beit_base_patch16_224", _TINY, (96, 64), 1, ((6, 4), (6, 4)), 1),
    _vit("eva", "eva_large_patch14_196"),
    _vit("eva02", "eva02_base_patch14_448"),
    _vit("eva02-tiny", "eva02_tiny_patch14_336", embed_dim=32),
    _vit("dinov3", "vit_small_patch16_dinov3", 5),
    _vit("dinov3-qkv-bias", "vit_small_patch16_dinov3_qkvb", 5),
    _vit("rope-mixed", "vit_small_patch16_rope_mixed_224"),
    _vit("rope-axial", "vit_small_patch16_rope_ape_224"),
]


def _teacher(case: Case) -> Teacher:
    config = TeacherConfig(
        model=case.model,
        pretrained=False,
        model_kwargs=case.kwargs,
        img_size=case.img_size,
        tail_blocks=case.tail_blocks,
    )
    return _with_lively_weights(load_teacher(config))


def _with_lively_weights(teacher: Teacher) -> Teacher:
    """Undo near-zero initialisations, under which a wrong block or head would not show."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    return teacher


def _pixels(teacher: Teacher, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    shape = (batch, 3, *teacher.spec.img_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_one_forward_gives_timms_features_and_logits_and_the_tail_repeats_them(
    case: Case, tmp_path: Path
) -> None:
    teacher = _teacher(case)
    pixels = _pixels(teacher)
    features, logits = teacher(pixels)
    assert logits is not None

    stages = teacher.spec.stages
    assert (stages[3].grid, stages[4].grid) == case.grids
    for stage in (3, 4):
        shape = stages[stage]
        assert shape.num_prefix_tokens == case.prefix
        assert features[stage].shape == (2, shape.num_tokens, shape.num_channels)

    images = teacher.normalise(pixels)
    assert torch.equal(logits, teacher.model(images))
    final = teacher.model.forward_features(images)
    assert torch.equal(features[4], final.flatten(1, -2))

    teacher.calibrate_prefix([teacher(pixels).features[3]])
    save_tail(teacher.tail(), tmp_path / "tail.safetensors")
    for tail in (teacher.tail(), load_tail(tmp_path / "tail.safetensors")):
        prefix, patches = features[3].split([case.prefix, stages[3].num_patch_tokens], dim=1)
        again = tail.forward_features(patches, prefix if case.prefix else None)
        assert _difference(again, features[4]) <= 1e-6
        assert (
            _difference(
                tail(patches, prefix if case.prefix else None), features[4][:, case.prefix :]
            )
            <= 1e-6
        )
        assert _difference(tail.head(features[4]), logits) <= 1e-6
        constant = tail(patches)
        assert constant.shape == (2, stages[4].num_patch_tokens, stages[4].num_channels)
        assert constant.isfinite().all()
