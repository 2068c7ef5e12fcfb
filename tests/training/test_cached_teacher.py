"""Labels and classes: the cache's are learnt, so images that are labelled otherwise are refused."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache import JoinedReader
from scalekd.errors import CacheMismatch
from scalekd.images import ImageOptions
from scalekd.loading import CachedViewLoader
from scalekd.pipelines._source_options import ExtendConfig
from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache
from scalekd.pipelines.extend_cache import extend_cache
from scalekd.pipelines.share_cache import ShareConfig, share_cache
from scalekd.pipelines.train_student import train_student
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig
from scalekd.training import CachedTeacher, TrainConfig

Labelled = Callable[..., Path]


@pytest.fixture
def labelled(
    tmp_path: Path, image_bytes: Mapping[int, bytes], write_tar: Callable[..., Path]
) -> Labelled:
    """Writes the 70 images as a shard; ``label_of`` tells the class of each, or None."""

    def write(name: str, label_of: Callable[[int], int | None]) -> Path:
        members: dict[str, bytes] = {}
        for number, image in image_bytes.items():
            key, label = f"sample-{number:03d}", label_of(number)
            members[f"{key}.{'png' if number % 5 == 0 else 'jpg'}"] = image
            if label is not None:
                members[f"{key}.cls"] = b"%d" % label
        write_tar(tmp_path / name / "train-0.tar", members)
        return tmp_path / name

    return write


def open_loader(teacher: CachedTeacher, *, img_size: int = 32) -> CachedViewLoader:
    student = create_student("test_resnet", num_classes=teacher.num_classes, img_size=img_size)
    targets = teacher.targets(teacher.module(student, objective="none").objective)
    return teacher.loader(student, targets, batch_size=10)


def test_images_with_changed_labels_are_refused_with_both_labels(
    sound_cache: Path, labelled: Labelled
) -> None:
    turned = labelled("turned", lambda number: (number + 1) % 10 if number >= 65 else number % 10)
    teacher = CachedTeacher(sound_cache, data_dir=turned)
    with pytest.raises(CacheMismatch) as caught:
        open_loader(teacher)
    for words in (
        "turned/train-*.tar gives 5 of the 70 samples",
        "'sample-065': class 6 here, class 5 ('class 5') in the cache",
        "write the cache again, or restore the labels",
    ):
        assert words in str(caught.value)


def test_images_without_labels_are_accepted(sound_cache: Path, labelled: Labelled) -> None:
    teacher = CachedTeacher(sound_cache, data_dir=labelled("bare", lambda _: None))
    batch = next(open_loader(teacher).epoch(0))
    assert len(set(batch["label"].tolist()) & set(range(10))) > 1


def test_labels_of_the_cache_are_used_without_those_of_the_images_and_said(
    sound_cache: Path, labelled: Labelled
) -> None:
    turned = labelled("turned", lambda number: (number + 1) % 10)
    teacher = CachedTeacher(sound_cache, data_dir=turned, image_options=ImageOptions(labels="none"))
    batch = next(open_loader(teacher).epoch(0))
    assert len(set(batch["label"].tolist()) & set(range(10))) > 1
    student = create_student("test_resnet", num_classes=10, img_size=32)
    for objective, says in (("none", True), ("kd", True), ("features", False)):
        notes = teacher.notes_for(teacher.module(student, objective=objective).objective)
        assert any("reads the labels of the cache" in note for note in notes) == says


def test_labels_are_compared_whenever_images_are_read(
    sound_cache: Path, tiny_images: Path, labelled: Labelled, tmp_path: Path
) -> None:
    """A cache of views needs the images at another size, and does not look at them at its own."""
    turned = labelled("turned", lambda number: (number + 1) % 10)
    config = ConvertConfig(
        source=str(sound_cache),
        output=str(tmp_path / "views"),
        format="webdataset",
        embed="view",
        data_dir=str(tiny_images),
        workers=0,
    )
    convert_cache(config)
    teacher = CachedTeacher(tmp_path / "views", data_dir=turned)
    assert teacher.class_names == tuple(f"class {number}" for number in range(10))
    assert open_loader(teacher)
    with pytest.raises(CacheMismatch, match="70 of the 70 samples"):
        open_loader(teacher, img_size=48)
    assert open_loader(CachedTeacher(tmp_path / "views", data_dir=tiny_images), img_size=48)


def test_only_labels_of_available_samples_are_compared(
    sound_cache: Path, labelled: Labelled, tmp_path: Path
) -> None:
    """Shard 1 holds samples 24 to 47."""
    part = tmp_path / "part"
    share_cache(ShareConfig(source=str(sound_cache), target=str(part), shards=(1, 1)))
    outside = labelled("outside", lambda number: number % 10 if 24 <= number < 48 else 3)
    assert len(open_loader(CachedTeacher(part, data_dir=outside)).views) == 24
    turned = labelled("turned", lambda number: 9 if number == 24 else number % 10)
    with pytest.raises(CacheMismatch, match=r"1 of the 24 .*'sample-024': class 9 here, class 4"):
        open_loader(CachedTeacher(part, data_dir=turned))


def test_a_student_has_all_classes_of_the_images_where_the_cache_is_a_part(
    make_cache: Callable[..., Any], labelled: Labelled, tmp_path: Path
) -> None:
    """Nothing names the classes, and the teacher has no head."""
    images = labelled("images", lambda number: number % 10)
    headless = TeacherConfig(
        model="test_vit", pretrained=False, img_size=(32, 32), model_kwargs={"num_classes": 0}
    )
    settings = {"teacher": headless, "logits": "none", "data_dir": str(images)}
    make_cache(tmp_path / "cache", limit=4, passes=1, **settings)
    assert CachedTeacher(tmp_path / "cache", data_dir=images).num_classes == 10


@pytest.fixture
def folders(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the three class folders ``blue``, ``green`` and ``red``."""
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


def test_a_class_folder_that_came_before_the_others_is_refused(cache: Path, folders: Path) -> None:
    shutil.copytree(folders / "train/red", folders / "train/cyan")
    with pytest.raises(CacheMismatch) as caught:
        open_loader(CachedTeacher(cache, data_dir=folders))
    assert "32 of the 48 samples" in str(caught.value)  # green and red come after it
    assert "class folders with images are numbered in order of name" in str(caught.value)


def test_labels_of_an_extension_are_compared_too(
    cache: Path, folders: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(cache, tmp_path / "cache")
    config = ExtendConfig(
        cache=root,
        data_dir=str(folders),
        name="second",
        model="test_vit2",
        pretrained=False,
        model_kwargs={"num_classes": 3},
        workers=0,
    )
    assert extend_cache(config).complete
    teacher = CachedTeacher(root, data_dir=folders, targets="second")
    assert isinstance(teacher.reader, JoinedReader)
    assert open_loader(teacher)
    shutil.copytree(folders / "train/red", folders / "train/cyan")
    with pytest.raises(CacheMismatch, match=r"class 3 \('red'\) here, class 2 \('red'\) in"):
        open_loader(CachedTeacher(root, data_dir=folders, targets="second"))


def test_classes_are_those_of_the_cache_although_the_images_have_more(
    cache: Path, folders: Path, tmp_path: Path
) -> None:
    """Neither an empty folder nor a new class after the last shifts labels or validation."""
    for split in ("train", "val"):
        (folders / split / "amber").mkdir()
    shutil.copytree(folders / "train/red", folders / "train/violet")
    teacher = CachedTeacher(cache, data_dir=folders)
    assert teacher.class_names == ("blue", "green", "red")
    options = {
        "cache": str(cache),
        "data_dir": str(folders),
        "model": "test_resnet",
        "objective": "none",
        "epochs": 4,
        "batch_size": 16,
        "workers": 0,
        "amp": "no",
        "lr": 2e-3,
        "output": str(tmp_path / "run"),
    }
    result = train_student(TrainConfig.from_mapping(options))
    assert result.samples_viewed == 4 * 48


def test_class_names_that_the_cache_lacks_come_from_the_images(
    make_cache: Callable[..., Any], labelled: Labelled, tmp_path: Path
) -> None:
    images = labelled("images", lambda number: number % 10)
    make_cache(tmp_path / "cache", data_dir=str(images), passes=1)
    assert CachedTeacher(tmp_path / "cache", data_dir=images).class_names is None
    (images / "classes.txt").write_text("\n".join("abcdefghij"))
    assert CachedTeacher(tmp_path / "cache", data_dir=images).class_names == tuple("abcdefghij")
