"""A class is a name, from the teacher through the cache and the student to its evaluation.

The images lie in class folders named after what the teacher answers on them, so that a teacher
that is compared by name is always right, and one that is compared by number hardly ever.
"""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from scalekd.cache import open_cache
from scalekd.cache.documents.manifest import Identity
from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.images import open_dataset
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.evaluate import EvaluateConfig, evaluate
from scalekd.pipelines.export import export
from scalekd.pipelines.train_student import train_student
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig, load_teacher
from scalekd.training import CachedTeacher, TrainConfig

SIDE = 32
# Not in alphabetical order, as class folders are.
NAMES = ("truck", "ship", "horse", "frog", "dog", "deer", "cat", "bird", "automobile", "airplane")


def teacher_folder(folder: Path, model: torch.nn.Module, names: tuple[str, ...] | None) -> str:
    folder.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    preprocessing = {
        "custom_load": False,
        "input_size": [3, SIDE, SIDE],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "num_classes": len(NAMES),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config: dict[str, Any] = {
        "architecture": "test_vit",
        "num_classes": len(NAMES),
        "model_args": {"num_classes": len(NAMES), "img_size": SIDE},
        "pretrained_cfg": preprocessing,
    }
    if names is not None:
        config["label_names"] = list(names)
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


class Setting:
    """A teacher of ten named classes, and images in folders of what it answers."""

    def __init__(self, root: Path) -> None:
        generator = np.random.default_rng(0)
        pictures = generator.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
        images = [
            Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for p in pictures
        ]
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=len(NAMES), img_size=SIDE).eval()
        pixels = torch.tensor(np.stack([np.asarray(image) for image in images]))
        with torch.no_grad():
            self.logits = model((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
            # A random head prefers one class; without its mean all occur.
            model.head.bias -= self.logits.mean(dim=0)
            self.logits -= self.logits.mean(dim=0)
        self.answers = self.logits.argmax(dim=1).tolist()
        self.teacher = teacher_folder(root / "teacher", model, NAMES)
        self.unnamed = teacher_folder(root / "unnamed", model, None)
        self.images = images

    def folders(
        self, root: Path, classes: dict[str, str], splits: tuple[str, ...] = ("train",)
    ) -> Path:
        """Write the images of some classes; ``classes`` gives each class's name its folder's."""
        for number, (image, answer) in enumerate(zip(self.images, self.answers, strict=True)):
            for split in splits if NAMES[answer] in classes else ():
                folder = root / split / classes[NAMES[answer]]
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{number}.png")
        return root


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def five(setting: Setting, tmp_path: Path) -> Path:
    """Folders of the five most frequent classes, of all splits."""
    counts = np.bincount(setting.answers, minlength=10)
    names = [NAMES[number] for number in np.argsort(-counts)[:5]]
    assert counts.max() < 0.6 * counts.sum()
    return setting.folders(tmp_path / "data", {name: name for name in names}, ("train", "val"))


def cached(setting: Setting, data: Path, output: Path, **changes: Any) -> Any:
    teacher = {"model": setting.teacher, **changes.pop("teacher", {})}
    settings = {"aug": "center:1.0", "stages": (4,), "workers": 0, "codec": "float16"}
    return cache_teacher(
        CacheTeacherConfig(
            teacher=TeacherConfig(**teacher),
            data_dir=str(data),
            output=output,
            **{**settings, **changes},
        )
    )


def trained(cache: Path, data: Path, output: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "model": "test_resnet",
        "objective": "kd",
        "epochs": 1,
        "batch_size": 8,
        "workers": 0,
    }
    return train_student(
        TrainConfig(
            cache=str(cache), data_dir=str(data), output=str(output), **{**settings, **changes}
        )
    )


def by_hand(data: Path) -> tuple[list[str], list[int]]:
    """Class names of the folders, and the teacher's number of each."""
    names = sorted(folder.name for folder in (data / "train").iterdir())
    return names, [NAMES.index(name) for name in names]


@pytest.mark.parametrize("logits", ["full", "topk:10", "topk:3"])
def test_targets_are_the_teachers_logits_of_the_named_classes(
    setting: Setting, five: Path, tmp_path: Path, logits: str
) -> None:
    result = cached(setting, five, tmp_path / "cache", logits=logits)
    assert result.teacher_top1 == 100.0  # 20 % or less by number
    names, numbers = by_hand(five)
    identity = open_cache(tmp_path / "cache").identity
    assert identity.class_map == tuple(numbers)
    assert identity.teacher["class_names"] == list(NAMES)

    source = CachedTeacher(tmp_path / "cache", data_dir=five)
    assert (source.num_classes, source.class_names) == (5, tuple(names))
    student = create_student("test_resnet", num_classes=5, img_size=SIDE)
    module = source.module(student, objective="kd")
    loader = source.loader(
        student, decoder := source.targets(module.objective), batch_size=8, num_workers=0, seed=0
    )
    for batch in loader.epoch(0):
        targets = decoder(batch)
        assert targets.logits is not None
        probabilities = targets.logits.probabilities()
        assert probabilities.shape[1] == 5
        assert torch.allclose(probabilities.sum(dim=1), torch.ones(len(probabilities)))
        # The label and the likeliest class are one name.
        assert torch.equal(probabilities.argmax(dim=1), batch["label"])
        if logits == "topk:3":
            continue
        # Of each image, the teacher's scores of the five, renormalised.
        every = (setting.logits[:, numbers]).softmax(dim=1)
        distance = (probabilities[:, None] - every[None]).abs().amax(dim=2).amin(dim=1)
        assert (distance < 0.01).all()


def test_student_export_and_evaluation_have_the_datas_classes(
    setting: Setting, five: Path, tmp_path: Path
) -> None:
    cached(setting, five, tmp_path / "cache")
    trained(tmp_path / "cache", five, tmp_path / "run", val_cache=None)
    names, _ = by_hand(five)
    export(tmp_path / "run", tmp_path / "student", export_format="timm")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["label_names"] == names
    for model in (tmp_path / "run", tmp_path / "student"):
        found = evaluate(
            EvaluateConfig(model=str(model), data_dir=str(five), teacher=setting.teacher, workers=0)
        )
        assert found["teacher_top1"] == 100.0
        assert found["teacher_agreement"] == found["top1"]  # the teacher is always right
    found = evaluate(
        EvaluateConfig(
            model=setting.teacher,
            data_dir=str(five),
            teacher_cache=None,
            teacher=setting.teacher,
            workers=0,
        )
    )
    assert (found["top1"], found["teacher_agreement"], found["num_classes_evaluated"]) == (
        100,
        100,
        5,
    )


def test_a_live_teacher_is_compared_by_name_as_well(
    setting: Setting, five: Path, tmp_path: Path
) -> None:
    cached(setting, five, tmp_path / "cache")
    cached(setting, five, tmp_path / "val-cache", split="val")
    runs = [
        trained(
            tmp_path / "cache",
            five,
            tmp_path / name,
            val_cache=str(tmp_path / "val-cache"),
            **changes,
        )
        for name, changes in (
            ("offline", {}),
            ("online", {"online": True, "teacher": setting.teacher}),
        )
    ]
    assert [run.metrics["eval_teacher_top1"] for run in runs] == [100.0, 100.0]
    losses = [run.metrics["train_loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # logits were kept in half precision


def test_classes_that_the_teacher_does_not_have_are_refused_before_it_runs(
    setting: Setting, tmp_path: Path
) -> None:
    names = {name: name if name != "dog" else "hound" for name in NAMES}
    data = setting.folders(tmp_path / "data", names)
    with pytest.raises(DataError, match=r"'hound' is not a class of the teacher.*--class-map FILE"):
        cached(setting, data, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    folders = sorted(folder.name for folder in (data / "train").iterdir())
    path = tmp_path / "map.txt"
    path.write_text("".join(f"{name if name != 'hound' else 'dog'}\n" for name in folders))
    result = cached(setting, data, tmp_path / "cache", class_map=str(path))
    assert result.teacher_top1 == 100.0
    # Stored: a student of this cache needs no option.
    trained(tmp_path / "cache", data, tmp_path / "run", val_split=None)
    # The same command goes on; another map is another cache.
    cached(setting, data, tmp_path / "cache", class_map=str(path), passes=2)
    cached(setting, data, tmp_path / "cache", passes=2)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(CacheMismatch, match="--class-map"):
        cached(setting, data, tmp_path / "cache", class_map=str(path))


def test_an_unnamed_teacher_is_matched_by_number_if_the_counts_agree(
    setting: Setting, five: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unnamed = {"teacher": {"model": setting.unnamed}}
    wanted = r"5 classes.*10 classes without names.*--class-map FILE"
    result = cached(setting, five, tmp_path / "cache", **unnamed)  # needs no match
    assert result.teacher_top1 is None
    assert re.search(wanted, capfd.readouterr().err)
    with pytest.raises(DataError, match=wanted):
        trained(tmp_path / "cache", five, tmp_path / "run", val_split=None)
    trained(tmp_path / "cache", five, tmp_path / "run", objective="none", val_split=None)
    every = setting.folders(tmp_path / "all", {name: name for name in NAMES})
    capfd.readouterr()
    result = cached(setting, every, tmp_path / "numbers", **unnamed)
    said = capfd.readouterr().err
    assert "matched by number" in said
    assert result.teacher_top1 is not None
    assert result.teacher_top1 < 50
    assert "no better than chance" in said
    named = {"teacher": {"model": setting.unnamed, "class_names": NAMES}}
    assert cached(setting, five, tmp_path / "named", **named).teacher_top1 == 100.0
    few = {"teacher": {"model": setting.unnamed, "class_names": ("a", "b")}}
    with pytest.raises(UsageError, match="--teacher-classes has 2 names"):
        cached(setting, five, tmp_path / "few", **few)
    other = {"teacher": {"model": setting.unnamed, "class_names": NAMES[::-1]}}
    with pytest.raises(CacheMismatch, match="--teacher-classes"):
        cached(setting, five, tmp_path / "named", **other)


def test_a_cache_without_class_names_still_opens_and_continues(
    setting: Setting, tmp_path: Path
) -> None:
    """As caches of earlier releases: neither names nor a map in the plan."""
    every = setting.folders(tmp_path / "all", {name: name for name in NAMES})
    cached(setting, every, tmp_path / "cache", teacher={"model": setting.unnamed})
    identity = open_cache(tmp_path / "cache").identity
    assert "class_names" not in identity.teacher
    assert "class_map" not in identity.model_dump(mode="json")
    cached(setting, every, tmp_path / "cache", passes=2)  # by the teacher's folder with names
    assert open_cache(tmp_path / "cache").num_passes == 2


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ({"model_kwargs": {"num_classes": 5}}, "new, with random weights.*have 10 classes"),
        ({"model_kwargs": {"num_classes": 0}}, "no classification head"),
    ],
)
def test_a_head_that_classifies_nothing_gives_no_logits(
    setting: Setting,
    five: Path,
    tmp_path: Path,
    teacher: dict[str, Any],
    reason: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError, match=f"--logits full.*{reason}"):
        cached(setting, five, tmp_path / "cache", teacher=teacher, logits="full")
    cached(setting, five, tmp_path / "cache", teacher=teacher)
    assert "features alone are cached" in capfd.readouterr().err
    cached(setting, five, tmp_path / "views", teacher=teacher, stages=())
    assert "with --stages none, only views are cached" in capfd.readouterr().err
    identity = open_cache(tmp_path / "cache").identity
    assert identity.logits is None
    assert identity.teacher["num_classes"] is None
    with pytest.raises(UsageError, match="no logits"):
        trained(tmp_path / "cache", five, tmp_path / "run")
    assert trained(tmp_path / "cache", five, tmp_path / "plain", objective="none").epochs == 1


@pytest.mark.parametrize(
    "model",
    [
        "vit_xsmall_patch16_clip_224",
        "vit_base_patch32_clip_224.openai",
        "vit_pe_core_tiny_patch16_384.fb",
        "eva02_base_patch16_clip_224.merged2b",
    ],
)
def test_a_projection_of_an_image_tower_is_no_classifier(model: str) -> None:
    size = (224, 224) if "base" in model else (32, 32)
    teacher = load_teacher(TeacherConfig(model=model, pretrained=False, img_size=size))
    assert teacher.spec.num_classes is None
    assert teacher.no_classifier is not None
    assert "projection" in teacher.no_classifier


def test_class_maps_and_names_of_an_untrusted_plan_are_checked(
    setting: Setting, five: Path, tmp_path: Path
) -> None:
    cached(setting, five, tmp_path / "cache")
    document = open_cache(tmp_path / "cache").identity.model_dump(mode="json")
    Identity.model_validate(document)
    for forged in ([0, 0, 1, 2, 3], [0, 1, 2, 3, 10], [0, 1, 2], [-1, 1, 2, 3, 4], "names", []):
        with pytest.raises(ValidationError):
            Identity.model_validate({**document, "class_map": forged})
    for names in (["a"] * 9, ["a" * 1001] * 10, [1] * 10):
        teacher = {**document["teacher"], "class_names": names}
        with pytest.raises(ValidationError):
            Identity.model_validate({**document, "teacher": teacher})


def test_unlabelled_samples_are_counted_before_the_teacher_runs(
    setting: Setting,
    write_tar: Callable[[Path, dict[str, bytes]], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    members: dict[str, bytes] = {}
    for number, image in enumerate(setting.images[:8]):
        out = io.BytesIO()
        image.save(out, "PNG")
        members[f"{number}.png"] = out.getvalue()
        if number not in (3, 5):
            members[f"{number}.cls"] = str(setting.answers[number]).encode()
    write_tar(tmp_path / "data" / "train-0.tar", members)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(NAMES))
    result = cached(setting, tmp_path / "data", tmp_path / "cache")
    assert (result.teacher_top1, result.num_labelled_views) == (100.0, 6)
    assert "2 of the 8 samples have no label" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "data" / "classes.txt").write_text("\n".join(NAMES[:3]))
    with pytest.raises(DataError, match="only 3 classes have names"):
        cached(setting, tmp_path / "data", tmp_path / "cache")
    with pytest.raises(DataError, match="only 3 classes have names"):
        open_dataset(str(tmp_path / "data"))
