"""The transfer benchmark in a tiny form: scenes, segmentation, every kind of arm, and the table."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.transfer import __main__, setting
from benchmarks.transfer.data import HELD_OUT, write_image_sets
from benchmarks.transfer.pretraining import Room, pretrain
from benchmarks.transfer.scenes import SCENE_PX, Scenes, compose
from benchmarks.transfer.segmentation import Segmenter, intersection_over_union, segment
from benchmarks.transfer.tables import table, transfer_section

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
ARM = {arm.name: arm for arm in setting.ARMS}


def jpeg(rng: np.random.Generator, colour: int, side: int = 32) -> bytes:
    file = io.BytesIO()
    pixels = rng.integers(0, 60, (side, side, 3), dtype=np.uint8) + np.uint8(19 * colour)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data: ten classes of 16 + 8 images, a headless teacher, photographs."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "cifar10").mkdir()
    (folder / "cifar10" / "classes.txt").write_text("\n".join(CLASSES))
    for source, count in (("train", 160), ("val", 80)):
        with tarfile.open(folder / "cifar10" / f"{source}-000000.tar", "w") as tar:
            for number in range(count):
                label = number % len(CLASSES)
                for kind, content in (("cls", str(label).encode()), ("jpg", jpeg(rng, label))):
                    member = tarfile.TarInfo(f"{source}_{number:03}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "imagenet-sample").mkdir()
    for number in range(5):
        path = folder / "imagenet-sample" / f"{number}.JPEG"
        path.write_bytes(jpeg(rng, number, 100))
    _write_teacher(folder / "teacher" / setting.TEACHER)
    return folder


def _write_teacher(folder: Path) -> None:
    arguments = {"patch_size": 14, "embed_dim": 24, "depth": 3, "num_heads": 1}
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=0, img_size=70, **arguments)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": 24,
        "global_pool": "token",
        "model_args": {**arguments, "img_size": 70},
        "pretrained_cfg": {
            "input_size": [3, 70, 70],
            "fixed_input_size": True,
            "num_classes": 0,
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def images(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_image_sets(data / "cifar10", folder, per_class=8)
    return folder


def test_image_sets_share_neither_classes_nor_images(images: Path) -> None:
    files = {
        split: sorted(images.glob(f"{split}/*/*.jpg")) for split in ("pretrain/*", "transfer/*")
    }
    assert {path.parent.name for path in files["transfer/*"]} == set(HELD_OUT)
    assert {path.parent.name for path in files["pretrain/*"]} == set(CLASSES) - set(HELD_OUT)
    names = [path.name for paths in files.values() for path in paths]
    assert len(set(names)) == len(names) == 6 * (8 + 8) + 4 * (8 + 8 + 8)
    # An image keeps its label: those of a class have its colour.
    for paths in files.values():
        for path in paths:
            colour = np.asarray(Image.open(path)).mean()
            assert CLASSES[round((colour - 30) / 19)] == path.parent.name


def test_a_scene_has_objects_where_its_mask_says(data: Path, images: Path) -> None:
    folders = [images / "transfer" / "train" / name for name in sorted(HELD_OUT)]
    objects = [sorted(folder.iterdir()) for folder in folders]
    photographs = sorted((data / "imagenet-sample").iterdir())[:1]  # of values below 60
    scenes = compose(objects, photographs, 6, seed=3)
    again = compose(objects, photographs, 4, seed=3)
    assert np.array_equal(scenes.images[:4], again.images)  # a scene has a seed of its own
    assert np.array_equal(scenes.masks[:4], again.masks)
    assert scenes.images.shape == (6, SCENE_PX, SCENE_PX, 3)
    assert (scenes.masks.reshape(6, -1).max(axis=1) > 0).all()
    for label in np.unique(scenes.masks):
        expected = 30.0 + (0 if label == 0 else 19 * CLASSES.index(sorted(HELD_OUT)[label - 1]))
        assert scenes.images[scenes.masks == label].mean() == pytest.approx(expected, abs=4)


def test_intersection_over_union() -> None:
    masks = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])
    answers = torch.tensor([[0, 1, 1, 1], [2, 2, 0, 0]])
    ratios = intersection_over_union(answers, masks, 4)
    assert ratios == pytest.approx([1 / 4, 2 / 3, 2 / 4, 0])


@pytest.mark.parametrize("frozen", [True, False])
def test_segmentation_learns_colours_and_a_frozen_backbone_stays(frozen: bool) -> None:
    rng = np.random.default_rng(0)
    masks = np.repeat(np.repeat(rng.integers(0, 3, (32, 2, 2)), 16, axis=1), 16, axis=2)
    pixels = 90 * masks[..., None] + rng.integers(0, 40, (32, 32, 32, 3))
    scenes = Scenes(pixels.astype(np.uint8), masks.astype(np.uint8))
    torch.manual_seed(0)
    backbone = timm.create_model(
        "resnet18", features_only=True, out_indices=(1, 2), layers=[1] * 4, channels=[8] * 4
    )
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = Segmenter(backbone, 3, frozen=frozen)
    scores = segment(model, scenes, scenes, epochs=12, rate=1e-2, seed=0)
    assert scores["object_miou"] > 60
    after = backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) == frozen


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "the tuned teacher itself, at 70 px",
        "from scratch",
        "no teacher",
        "logits only",
        "ScaleKD-light",
        "features only",
    ],
)
def test_students_are_pre_trained_and_transferred(
    name: str, data: Path, images: Path, tmp_path: Path
) -> None:
    room = Room(images, data / "teacher" / setting.TEACHER, tmp_path, passes=1, epochs=2)
    student = pretrain(ARM[name], 1, room)
    trained = ARM[name].objective not in ("scratch", "teacher")
    assert student.views == (64 if trained else 0)
    assert (student.cpu_seconds > 0) == trained
    assert (student.own_top1 is None) == (ARM[name].objective in ("scratch", "features"))
    if student.backbone is not None:
        own = student.model.state_dict()
        shared = student.backbone.state_dict()
        assert all(torch.equal(own[key], value) for key, value in shared.items())
    photographs = data / "imagenet-sample"
    scenes = __main__.scenes_of("dev", images, photographs, {"train": 16, "test": 4})
    scores = __main__.transfer(student, 1, split="dev", images=images, scenes=scenes)
    assert all(0 <= value <= 100 for value in scores.values())
    row = __main__.row_of(ARM[name], 1, student, scores)
    assert name in "\n".join(table([json.loads(json.dumps(row))]))


def row(arm: str, seed: int, score: float) -> dict[str, Any]:
    measures = (
        *("frozen_object_miou", "fine_tuned_object_miou"),
        *("linear_top1", "knn_top1", "own_top1"),
    )
    scores = {name: score + number for number, name in enumerate(measures)}
    return {"arm": arm, "seed": seed, "views": 27_648, "train_cpu_seconds": 30 + seed, **scores}


def test_the_table_has_gains_over_the_student_without_a_teacher(tmp_path: Path) -> None:
    rows = [
        *(row("no teacher", seed, 20 + seed) for seed in (1, 2)),
        *(row("ScaleKD-light", seed, 20 + 2 * seed) for seed in (1, 2, 3)),
    ]
    (tmp_path / "transfer.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    text = transfer_section(tmp_path, tmp_path)
    assert "| no teacher |  | 21.5 ± 0.7 | 22.5 ± 0.7 |" in text
    assert "| ScaleKD-light | tuned | 24.0 ± 2.0 (+1.5 ± 0.7) |" in text  # gains of two seeds
    assert "27,648 | 32 | 3 |" in text
    teacher = row("the tuned teacher itself, at 70 px", 1, 40) | {"own_top1": 80.0}
    del teacher["frozen_object_miou"], teacher["fine_tuned_object_miou"]
    assert "| tuned |  |  | 42.0 | 43.0 | 80.0 |" in "\n".join(table([*rows, teacher]))
    assert "scratch |" not in text
    assert "No teacher has seen a label of the four classes" in text
    assert transfer_section(tmp_path / "none", tmp_path) == ""
