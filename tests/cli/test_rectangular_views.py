"""Views and students of another height than width, from the command line to the export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import BaseModel, ValidationError

from scalekd.cache import open_cache
from scalekd.errors import UsageError
from scalekd.options import ImageSize, height_and_width
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig, load_teacher
from scalekd.training import TrainConfig
from scalekd.training.run_folder import _changes

Run = Callable[..., Any]


class Record(BaseModel):
    size: ImageSize | None = None


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (224, 224),
        ("224", 224),
        ("192,320", (192, 320)),
        (" 192, 320", (192, 320)),
        ("192x320", (192, 320)),
        ([32, 64], (32, 64)),
        ("64,64", 64),
        ((64,), 64),
        (None, None),
    ],
)
def test_one_number_is_a_square(given: object, size: object) -> None:
    assert Record.model_validate({"size": given}).size == size
    if size is not None:
        height, width = height_and_width(size)  # type: ignore[arg-type]
        assert (height == width) == isinstance(size, int)


@pytest.mark.parametrize(
    "given", ["", "a", "12,x", "1,2,3", "0", "-3", "32,0", "4097", True, 1.5, [32, None], "[1,2]"]
)
def test_an_invalid_image_size_is_refused(given: object) -> None:
    with pytest.raises(ValidationError, match=r"an image size is S or H,W, each side in 1\.\.4096"):
        Record.model_validate({"size": given})


@pytest.fixture
def done(run: Run) -> Callable[..., dict[str, Any]]:
    """Runs a command to the end and returns its JSON."""

    def command(*arguments: object) -> dict[str, Any]:
        ran = run(*arguments, "--json")
        assert ran.code == 0, ran.err
        answer: dict[str, Any] = ran.json
        return answer

    return command


@pytest.mark.parametrize("codec", ["transform", "int8"])
def test_all_commands_work_with_rectangular_views(
    done: Callable[..., dict[str, Any]], tiny_images: Path, tmp_path: Path, codec: str
) -> None:
    images = ("--data-dir", tiny_images)
    teacher = ("--model", "test_vit", "--no-pretrained", "--model-kwargs", "num_classes=10")
    views = ("--img-size", "32,64", "--aug", "crop+flip+erase:0.5", "--codec", codec)
    cache, run = tmp_path / "cache", tmp_path / "run"
    done("cache-teacher", *teacher, *images, *views, "-j0", "--output", cache)
    reader = open_cache(cache)
    assert reader.identity.views.view_size == (32, 64)
    assert reader.identity.stages["4"].grid == (2, 4)
    assert done("cache", "verify", cache, *images, "--deep", 4)["sound"]

    train = ("train-student", "--cache", cache, *images, "-b16", "-j0", "--epochs", 1)
    train += ("--model", "test_resnet", "--val-split", "train")
    done(*train, "--output", run)
    args = TrainConfig.from_yaml(run / "args.yaml")
    assert args.img_size is None
    scores = done("evaluate", run, *images, "--split", "train", "-j0")
    assert scores["img_size"] == [32, 64]
    square = done("evaluate", run, *images, "--split", "train", "-j0", "--img-size", 48)
    assert square["img_size"] == [48, 48]

    done("export", run, "--output", tmp_path / "export")
    exported = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert tuple(exported.pretrained_cfg["input_size"]) == (3, 32, 64)

    # Another size and shape than the teacher's: a sample of the views is drawn twice and compared.
    other = tmp_path / "other"
    done(*train, "--output", other, "--img-size", "64,32")
    assert TrainConfig.from_yaml(other / "args.yaml").img_size == (64, 32)
    assert done("evaluate", other, *images, "--split", "train", "-j0")["img_size"] == [64, 32]
    online = ("--online", "--distillation", "kd=false", "--val-split", "none")
    done(*train, "--output", tmp_path / "online", "--img-size", "48,32", *online)


def test_a_side_that_the_teacher_refuses_is_named(
    run: Run, tiny_images: Path, tmp_path: Path
) -> None:
    command = (
        "cache-teacher",
        "--model",
        "test_vit",
        "--no-pretrained",
        "--output",
        tmp_path / "c",
    )
    ran = run(*command, "--data-dir", tiny_images, "--img-size", "32,50")
    assert ran.code == 2
    assert "multiples of 16 px, such as 48, 64, 80, not 32 x 50" in ran.err
    for bad in ("32,", "32*48", "48,32,16", "0,32"):
        ran = run(*command, "--data-dir", tiny_images, "--img-size", bad)
        assert ran.code == 2
        assert "an image size is S or H,W" in ran.err


_STUDENTS: list[tuple[str, dict[str, Any]]] = [
    ("test_resnet", {}),
    ("test_convnext", {}),
    ("test_efficientnet", {}),
    ("test_vit", {}),
    ("vit_small_patch16_224", {"depth": 4, "embed_dim": 32, "num_heads": 2}),
    ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 24}),
    ("swinv2_tiny_window8_256", {"depths": [1, 1, 1, 1], "embed_dim": 24, "window_size": 4}),
    ("mixer_s16_224", {}),
]


@pytest.mark.parametrize(("model", "kwargs"), _STUDENTS)
def test_students_of_every_kind_accept_rectangular_images(
    model: str, kwargs: dict[str, Any]
) -> None:
    student = create_student(model, num_classes=3, img_size=(64, 128), model_kwargs=kwargs)
    assert student.spec.img_size == (64, 128)
    output = student(torch.zeros(2, 3, 64, 128))
    rows, columns = output.levels[1].shape[2:]
    assert columns == 2 * rows
    assert (rows, columns) == student.spec.levels[1].grid


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("test_vit", (8, 64)),
        ("maxvit_nano_rw_256", (64, 100)),
        ("coatnet_nano_rw_224", (64, 100)),
        ("swin_tiny_patch4_window7_224", (2, 64)),
    ],
)
def test_a_student_that_cannot_take_the_size_is_refused_before_the_first_view(
    model: str, size: tuple[int, int]
) -> None:
    with pytest.raises(UsageError, match=r"at {} x {} px|img_size=".format(*size)):
        create_student(model, num_classes=3, img_size=size)


@pytest.mark.parametrize(
    "model", ["dinov2_s", "vit_small_patch16_dinov3", "swin_t", "beit_base_patch16_224", "resnet18"]
)
def test_teachers_of_every_kind_accept_rectangular_images(model: str) -> None:
    size = (56, 112) if model == "dinov2_s" else (64, 128)
    teacher = load_teacher(TeacherConfig(model=model, pretrained=False, img_size=size))
    rows, columns = teacher.spec.stages[4].grid
    assert columns == 2 * rows
    features = teacher(torch.zeros(1, 3, *size, dtype=torch.uint8)).features[4]
    assert features.shape[1] == rows * columns + teacher.spec.stages[4].num_prefix_tokens


def test_a_run_is_not_continued_at_another_shape(tmp_path: Path) -> None:
    values = {"model": "test_resnet", "output": str(tmp_path)}
    square = TrainConfig.from_mapping({**values, "img_size": 64})
    assert _changes(square, TrainConfig.from_mapping({**values, "img_size": "64,64"})) == []
    with pytest.raises(UsageError, match="img_size = 64 and cannot continue with"):
        _changes(square, TrainConfig.from_mapping({**values, "img_size": "64,32"}))
