"""Teachers without a tail: other timm models, and modules of one's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalekd.cache import open_cache
from scalekd.errors import CacheMismatch, UsageError
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.students import create_student
from scalekd.teachers import (
    ALIASES,
    TeacherConfig,
    load_teacher,
    resolve_model_name,
    teacher_from_module,
)
from scalekd.training import CachedTeacher

# ConvNets, hierarchical and flat transformers, a SAM encoder, a mixer.
MODELS = [
    ("test_convnext", (16, 48), (4, 64)),
    ("resnet18", (16, 256), (4, 512)),
    ("hiera_tiny_224", (16, 384), (4, 768)),
    ("maxvit_rmlp_pico_rw_256", (16, 128), (4, 256)),
    ("samvit_base_patch16_224", (16, 768), (16, 768)),
    ("mixer_s16_224", (16, 512), (16, 512)),
]


@pytest.mark.parametrize(("model", "stage3", "stage4"), MODELS)
def test_every_timm_model_with_inner_features_gives_them_and_its_logits(
    model: str, stage3: tuple[int, int], stage4: tuple[int, int]
) -> None:
    teacher = load_teacher(TeacherConfig(model=model, pretrained=False, img_size=(64, 64)))
    assert teacher.spec.family == "features"
    assert not teacher.has_tail
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        output, logits = teacher(pixels), teacher.model(teacher.normalise(pixels))
    assert output.logits is not None
    assert torch.allclose(output.logits, logits, atol=1e-4)
    for stage, shape in ((3, stage3), (4, stage4)):
        assert output.features[stage].shape[1:] == shape
        known = teacher.spec.stages[stage]
        assert (known.num_tokens, known.num_channels) == shape
    with pytest.raises(UsageError, match="has no tail"):
        teacher.tail()


def test_tokens_lie_row_by_row() -> None:
    """As in every other teacher's features: token ``columns * row + column``."""
    teacher = load_teacher(TeacherConfig(model="resnet18", pretrained=False, img_size=(64, 96)))
    assert teacher.spec.stages[4].grid == (2, 3)
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        tokens = teacher(pixels).features[4]
        final = teacher.model.forward_features(teacher.normalise(pixels))  # type: ignore[operator]
    assert torch.equal(tokens[0, 3 * 1 + 2], final[0, :, 1, 2])


def test_a_model_without_inner_features_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be a teacher"):
        load_teacher(TeacherConfig(model="efficientformer_l1", pretrained=False, img_size=(64, 64)))


class Own(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(self.conv(images))


class ChangesItsInput(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.sub_(1.0)


def test_a_module_may_change_its_input_in_place() -> None:
    teacher = teacher_from_module(ChangesItsInput(), name="own", img_size=8)
    assert teacher.spec.stages[4].num_channels == 3


def test_a_module_of_ones_own_is_a_teacher() -> None:
    teacher = teacher_from_module(
        Own(lambda x: ([x, x[:, :4]], x.mean(dim=(2, 3)))),
        name="own",
        img_size=(32, 48),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        class_names=list("abcdefgh"),
    )
    assert teacher.spec.num_classes == 8
    assert teacher.spec.stages[3].num_channels == 8
    assert (teacher.spec.stages[4].grid, teacher.spec.stages[4].num_channels) == ((4, 6), 4)
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    maps = teacher.model.conv(pixels / 255)  # type: ignore[operator]
    output = teacher(pixels)
    assert torch.allclose(output.features[3][1, 6 * 2 + 5], maps[1, :, 2, 5], atol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.mean(dim=(2, 3)), r"returned a tensor \(1, 8\)"),
        (lambda x: {"features": x}, "returned dict"),
        (lambda x: (x, x), r"logits must be \(batch, class\), not a tensor \(1, 8, 4, 4\)"),
        (lambda x: (x, x.mean(dim=(2, 3))[:, :0]), r"logits must be .*, not a tensor \(1, 0\)"),
        (lambda x: x[:, :0], r"for 1 images it returned a tensor \(1, 0, 4, 4\)"),
        (lambda x: x.long(), r"returned a tensor \(1, 8, 4, 4\) of torch\.int64"),
        (lambda x: torch.complex(x, x), r"a tensor \(1, 8, 4, 4\) of torch\.complex64"),
        (
            lambda x: x.mean(dim=0, keepdim=True),
            r"for 2 images it returned a tensor \(1, 8, 4, 4\)",
        ),
        (lambda x: (x, x.mean(dim=(0, 2, 3))[None]), r"not a tensor \(1, 8\) for 2 images"),
        (lambda x: x[:, :, len(x) :], r"\(1, 8, 3, 4\) for one image and \(2, 8, 2, 4\) for two"),
        (lambda x: [x, x, x], "returned list"),
        (lambda x: (x, x.mean(dim=(2, 3))), "2 class names for 8 classes"),
        (lambda x: x, "2 class names for 0 classes"),
    ],
)
def test_what_a_module_may_return_is_said(answer: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        teacher_from_module(Own(answer), name="own", img_size=32, class_names=("a", "b"))


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x - x.mean(dim=0, keepdim=True),
        lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
        lambda x: torch.nn.functional.dropout(x, 0.1),
        lambda x: [x / x.norm(), x],
        lambda x: (x, x.mean(dim=(2, 3)).softmax(dim=0)),
        lambda x: x.flip(0),
    ],
)
def test_outputs_that_depend_on_other_images_or_chance_are_refused(
    answer: Callable[[Tensor], Any],
) -> None:
    with pytest.raises(UsageError, match=r"own: .* differs by \d+% .* other images .* chance"):
        teacher_from_module(Own(answer), name="own", img_size=32)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x * 0,
        lambda x: torch.nn.functional.batch_norm(x, torch.zeros(8), torch.ones(8)),
        lambda x: torch.nn.functional.layer_norm(x, x.shape[1:]).bfloat16(),
    ],
)
def test_rounding_and_constants_are_no_dependence(answer: Callable[[Tensor], Any]) -> None:
    teacher = teacher_from_module(Own(answer), name="own", img_size=(16, 24))
    assert teacher.spec.stages[4].grid == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 0}, "own: img_size=0: .* each side in 1..4096"),
        ({"img_size": "abc"}, "own: img_size='abc'"),
        ({"name": ""}, "name='': give printable text"),
        ({"name": "a\nb"}, r"name='a\\nb': give printable text"),
        ({"mean": (0.5, 0.5)}, "expected three finite numbers each"),
        ({"std": (0.2, 0.2, 0.0)}, "std above 0"),
        ({"std": (0.2, 0.2, float("nan"))}, "expected three finite numbers each"),
    ],
    ids=str,
)
def test_impossible_arguments_of_a_module_are_one_line(
    arguments: dict[str, Any], message: str
) -> None:
    module = Own(lambda maps: maps)
    with pytest.raises(UsageError, match=message) as raised:
        teacher_from_module(module, **{"name": "own", "img_size": 32, **arguments})
    assert "\n" not in str(raised.value)


def test_a_cache_is_not_continued_by_a_module_whose_code_has_changed(
    tiny_images: Path, tmp_path: Path
) -> None:
    """The weights of both are the same."""

    def write(passes: int, answer: Callable[[Tensor], Any], **changes: Any) -> Any:
        torch.manual_seed(0)
        config = CacheTeacherConfig(
            teacher=TeacherConfig(model="own"),
            data_dir=str(tiny_images),
            output=tmp_path / "cache",
            workers=0,
            stages=(4,),
            passes=passes,
            **changes,
        )
        teacher = teacher_from_module(Own(answer), name="own", img_size=32)
        return cache_teacher(config, teacher=teacher)

    assert write(1, lambda maps: maps).complete
    with pytest.raises(CacheMismatch, match=r"stage4 differ now .* although its weights are the"):
        write(2, lambda maps: maps.flip(2))
    assert write(2, lambda maps: maps).shards_written == 1
    assert write(2, lambda maps: maps.relu(), overwrite=True).shards_written == 2


def test_students_learn_from_features_without_a_tail(tiny_images: Path, tmp_path: Path) -> None:
    config = CacheTeacherConfig(
        teacher=TeacherConfig(model="test_convnext", pretrained=False, img_size=(32, 32)),
        data_dir=str(tiny_images),
        output=tmp_path / "cache",
        workers=0,
    )
    assert cache_teacher(config).complete
    identity = open_cache(tmp_path / "cache").identity
    assert identity.tail is None
    assert set(identity.stages) == {"3", "4"}
    source = CachedTeacher(tmp_path / "cache", data_dir=tiny_images)
    student = create_student("test_resnet", num_classes=source.num_classes, img_size=32)
    module = source.module(student)
    assert "stage3_spatial_loss" in module.objective.loss_names
    assert module.objective.config.tpp is False
    asked = type(module.objective.config)(tpp=True)
    with pytest.raises(UsageError, match="--distillation tpp=false"):
        source.module(student, config=asked)


@pytest.mark.parametrize("alias", ["dinov2_s", "dinov2_b", "dinov2_reg_s", "dinov3_s", "siglip_l"])
def test_aliases_of_dense_teachers_have_a_size_fit_for_distillation(alias: str) -> None:
    name, sentence = resolve_model_name(alias)
    assert name == ALIASES[alias]
    assert sentence is not None
    assert "224 x 224 px" in sentence
    if alias in ("dinov2_s", "dinov2_reg_s", "dinov3_s"):
        teacher = load_teacher(TeacherConfig(model=alias, pretrained=False))
        assert teacher.spec.img_size == (224, 224)
        grid, prefix = {
            "dinov2_s": ((16, 16), 1),
            "dinov2_reg_s": ((16, 16), 5),
            "dinov3_s": ((14, 14), 5),
        }[alias]
        assert teacher.spec.stages[4].grid == grid
        assert teacher.spec.stages[4].num_prefix_tokens == prefix


def test_a_given_size_counts_more_than_the_aliass() -> None:
    teacher = load_teacher(TeacherConfig(model="dinov2_s", pretrained=False, img_size=(56, 56)))
    assert teacher.spec.img_size == (56, 56)


def test_every_alias_is_a_model_of_timm_with_that_tag() -> None:
    from timm.models import get_arch_pretrained_cfgs, is_model

    for name in ALIASES.values():
        architecture = name.partition(".")[0]
        assert is_model(architecture), name
        assert name in get_arch_pretrained_cfgs(architecture), name
