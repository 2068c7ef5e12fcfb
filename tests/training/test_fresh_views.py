"""Runs over more epochs than the cache has passes: with a live teacher, and with reused views."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache import open_cache
from scalekd.pipelines._source_options import ExtendConfig
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.extend_cache import extend_cache
from scalekd.pipelines.train_student import train_student
from scalekd.teachers import TeacherConfig
from scalekd.training import TrainConfig, planned_epochs

Options = dict[str, Any]


@pytest.fixture
def write_cache(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, **changes: Any) -> Path:
        teacher = TeacherConfig(
            model="test_vit", pretrained=False, img_size=32, model_kwargs={"num_classes": 3}
        )
        settings = {"codec": "float16", "batch_size": 16, "workers": 0, "shard_size": 16}
        cache_teacher(
            CacheTeacherConfig(
                teacher=teacher,
                data_dir=str(image_folder),
                output=tmp_path / name,
                **{**settings, **changes},
            )
        )
        return tmp_path / name

    return write


def train(cache: Path, image_folder: Path, **changes: Any) -> Any:
    values = {
        "cache": str(cache),
        "data_dir": str(image_folder),
        "val_split": None,
        "model": "test_resnet",
        "epochs": 3,
        "batch_size": 16,
        "workers": 0,
        "amp": "no",
        "sched": "constant",
        "output": str(cache.with_name(f"run-of-{cache.name}-{len(changes)}")),
        **changes,
    }
    return train_student(TrainConfig.from_mapping(values))


@pytest.mark.parametrize("stages", [(), (4,)])
def test_a_live_teacher_trains_from_a_cache_of_any_stages(
    write_cache: Callable[..., Path], image_folder: Path, stages: tuple[int, ...]
) -> None:
    """As from a cache of all passes and features: 2**-11 is the relative error of float16."""
    little = write_cache("little", stages=stages, logits="none", passes=1)
    full = write_cache("full", passes=3)
    online = train(little, image_folder, online=True).metrics
    cached = train(full, image_folder).metrics
    losses = [name for name in cached if name.endswith("_loss")]
    assert len(losses) >= 6  # task, KD and four views of features: the tail is at work
    for name in losses:
        assert online[name] == pytest.approx(cached[name], rel=1e-2), name


def test_the_tail_is_kept_with_any_stages_but_not_twice(
    write_cache: Callable[..., Path], image_folder: Path
) -> None:
    tails = {}
    for stages in ((), (4,), (3, 4)):
        name = "-".join(map(str, stages)) or "none"
        tails[stages] = open_cache(write_cache(name, stages=stages)).identity.tail_digest
    assert tails[()] is not None
    assert tails[()] == tails[(4,)] == tails[(3, 4)]
    cache = write_cache("base", stages=(4,))
    extend_cache(
        ExtendConfig(
            cache=cache, data_dir=str(image_folder), name="logits", logits="topk:2", workers=0
        )
    )
    extension = open_cache(cache / "extensions" / "logits")
    assert extension.identity.tail is None


def notes_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("note: ") and "epochs" in line]


def test_a_run_says_how_often_it_reuses_views(
    cache: Path, image_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"objective": "none", "output": str(tmp_path / "run")}
    train(cache, image_folder, **options)
    (line,) = notes_of(capfd.readouterr().err)
    assert "3 epochs over 2 passes: every view is trained on 1.5 times" in line
    train(cache, image_folder, **options | {"output": str(tmp_path / "two"), "epochs": 2})
    assert not notes_of(capfd.readouterr().err)
    train(cache, image_folder, **options | {"output": str(tmp_path / "fresh"), "online": True})
    (line,) = notes_of(capfd.readouterr().err)
    assert "3 epochs: 2 passes of the cache, and fresh views from then on" in line


def test_planned_epochs_count_warm_up_and_cool_down() -> None:
    def planned(**values: object) -> int:
        return planned_epochs(TrainConfig.from_mapping({"model": "a", "output": "b", **values}))

    assert planned(epochs=280, warmup_epochs=20, warmup_prefix=True) == 300
    assert planned(epochs=100, sched="step", decay_epochs=30) == 100
    assert planned(epochs=10, cooldown_epochs=5) == 15
    assert planned(epochs=10, sched="none") == 10
