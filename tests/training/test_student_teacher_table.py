"""Every student of the paper learns from every kind of teacher, at the real image size.

The teachers have their real widths, tokens, heads and tails; of the blocks before the tail, which
no student sees, there are few. ``python -m benchmarks.student_teacher_table`` takes the whole ones.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import student_teacher_table as table

SHALLOW = {"swin_l": "depths=[1,1,2,2]", "beit_l": "depth=3", "vit_l14": "depth=3"}
TOKENS = {"swin_l": [196, 49], "beit_l": [196, 196], "vit_l14": [256, 256]}
# In CI every student once and every teacher three times; `pytest -m table` runs the other pairs.
STUDENTS = {
    "mobilenetv1_100": "swin_l",
    "resnet50": "beit_l",
    "resnet50d": "vit_l14",
    "convnext_tiny": "swin_l",
    "mixer_s16_224": "vit_l14",
    "mixer_b16_224": "beit_l",
    "vit_small_patch16_224": "swin_l",
    "swin_tiny_patch4_window7_224": "vit_l14",
    "vit_base_patch16_224": "beit_l",
}
PAIRS = [
    pytest.param(
        teacher, student, marks=pytest.mark.slow if teacher == chosen else pytest.mark.table
    )
    for teacher in SHALLOW
    for student, chosen in STUDENTS.items()
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of ImageNet's usual size."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for number in range(2):
        pixels = random.integers(0, 256, (375, 500, 3), dtype=np.uint8)
        place = folder / "train" / f"class-{number}"
        place.mkdir(parents=True)
        Image.fromarray(pixels).save(place / "picture.jpg")
    return folder


@pytest.fixture(scope="module")
def cache_of(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def cache(teacher: str) -> Path:
        if teacher not in made:
            output = tmp_path_factory.mktemp(teacher) / "cache"
            made[teacher] = table.write_cache(
                teacher, images, output, model_kwargs=[SHALLOW[teacher]]
            )
        return made[teacher]

    return cache


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_one_real_step_moves_the_student_and_every_projector(
    teacher: str,
    student: str,
    images: Path,
    cache_of: Callable[[str], Path],
) -> None:
    row = table.one_step(cache_of(teacher), images, student)  # checks losses and gradients
    assert row["tokens"]["teacher"] == TOKENS[teacher]
    terms = {f"stage{stage}_{view}_loss" for stage in (3, 4) for view in ("spatial", "frequency")}
    assert {"task_loss", "kd_loss", "total", *terms} == set(row["losses"])


def test_the_students_are_those_of_the_benchmark() -> None:
    assert set(STUDENTS) == set(table.STUDENTS)
    assert set(SHALLOW) == set(table.TEACHERS) == set(STUDENTS.values())
