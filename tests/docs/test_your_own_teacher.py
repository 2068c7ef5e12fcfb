"""``docs/your-own-teacher.md``, run as it is written."""

from collections.abc import Callable
from pathlib import Path

from scalekd.cache import open_cache
from scalekd.pipelines.train_student import train_student
from scalekd.training import TrainConfig
from tests.conftest import run_program


def test_the_program_writes_a_cache_that_students_learn_from(
    programs: Callable[[str, str], dict[str, str]], working_folder: Callable[[], Path]
) -> None:
    folder = working_folder()
    code = programs("docs/your-own-teacher.md", "python")["own-teacher"]
    printed = run_program(code, folder)
    reader = open_cache(folder / "my-cache")
    assert int(printed) == len(reader.samples)
    assert reader.identity.teacher["stages"]["4"] == {
        "grid": [8, 8],
        "num_channels": 32,
        "num_prefix_tokens": 0,
    }
    config = TrainConfig(
        cache=str(folder / "my-cache"),
        data_dir=str(folder / "imagenet"),
        model="test_resnet",
        output=str(folder / "my-run"),
        epochs=1,
        batch_size=16,
        workers=0,
        val_split=None,
    )
    metrics = train_student(config).metrics
    assert metrics["train_stage3_spatial_loss"] > 0
    assert metrics["train_kd_loss"] > 0
