"""A run small enough to repeat: a real timm student, batches made from seeds, a tiny real cache."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from scalekd.distillation import FullLogits, Targets, build_objective
from scalekd.students import create_student
from scalekd.training import DistillationModule, NoTargets, TrainConfig, Trainer, student_facts

NUM_CLASSES = 4
BATCH_SIZE = 8


class SeededLoader:
    """Images whose brightness tells their class; a batch is a function of epoch and number."""

    def __init__(self, num_batches: int = 6, batch_size: int = BATCH_SIZE) -> None:
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.read: list[tuple[int, int]] = []
        self.before_batch: Callable[[int, int], None] = lambda epoch, number: None

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[dict[str, Tensor]]:
        torch.rand(())  # as a DataLoader does: starting an epoch draws from torch's generator
        for number in range(start_batch, self.num_batches):
            self.before_batch(epoch, number)
            self.read.append((epoch, number))
            random = torch.Generator().manual_seed(1000 * epoch + number)
            label = torch.randint(0, NUM_CLASSES, (self.batch_size,), generator=random)
            noise = torch.randint(0, 60, (self.batch_size, 3, 32, 32), generator=random)
            pixels = (noise + 60 * label[:, None, None, None]).to(torch.uint8)
            yield {"pixels": pixels, "label": label}


class OracleTargets(torch.nn.Module):
    """A teacher that is always right, and sure of it."""

    def forward(self, batch: dict[str, Tensor]) -> Targets:
        logits = 4 * torch.nn.functional.one_hot(batch["label"], NUM_CLASSES).float()
        return Targets(logits=FullLogits(logits))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state()  # or the first test's precision would hold for all
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """Builds a trainer from the same seed every time; keywords go to its configuration."""

    def make(
        output: Path,
        *,
        loader: Any = None,
        evaluate: Any = None,
        late: bool | None = None,
        **values: Any,
    ) -> Trainer:
        config = TrainConfig.from_mapping(
            {
                "model": "test_resnet",
                "output": str(output),
                "objective": "none",
                "epochs": 3,
                "batch_size": BATCH_SIZE,
                "amp": "no",
                "lr": 3e-3,
                "log_interval": 2,
                "drop_path": 0.2,
                **values,
            }
        )
        torch.manual_seed(config.seed)
        student = create_student(
            config.model,
            num_classes=NUM_CLASSES,
            img_size=32,
            model_kwargs={"drop_path_rate": config.drop_path},
        )
        AcceleratorState._reset_state()
        return Trainer(
            config,
            accelerator=Accelerator(cpu=True, mixed_precision=config.amp),
            module=DistillationModule(
                student,
                build_objective(config.objective, config.objective_config),
                mean=student.spec.mean,
                std=student.spec.std,
                channels_last=bool(config.channels_last),
            ),
            loader=loader or SeededLoader(),
            targets=OracleTargets() if config.objective == "kd" else NoTargets(),
            evaluate=evaluate,
            facts=student_facts(student.spec, ("dark", "dim", "light", "bright")),
            late=late,
        )

    return make


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes told apart by colour: 16 images each to train on, and 5, 6 and 8."""
    root = tmp_path_factory.mktemp("images")
    (root / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Colours\n")
    random = np.random.default_rng(0)
    for split, counts in (("train", (16, 16, 16)), ("val", (5, 6, 8))):
        for channel, count in enumerate(counts):
            folder = root / split / ("red", "green", "blue")[channel]
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 90, (48, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def cache(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes of a random ViT's features and logits of those images at 32 pixels."""
    from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
    from scalekd.teachers import TeacherConfig

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("cache") / "cache"
    cache_teacher(
        CacheTeacherConfig(
            teacher=TeacherConfig(
                model="test_vit",
                pretrained=False,
                img_size=(32, 32),
                model_kwargs={"num_classes": 3},
            ),
            data_dir=str(image_folder),
            output=root,
            codec="float16",
            passes=2,
            batch_size=16,
            workers=0,
            shard_size=16,
        )
    )
    torch.set_num_threads(threads)
    return root


def headless_teacher() -> Any:
    from scalekd.teachers import TeacherConfig

    return TeacherConfig(
        model="test_vit", pretrained=False, img_size=32, model_kwargs={"num_classes": 0}
    )


@pytest.fixture(scope="session")
def flat_folder(image_bytes: Mapping[int, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 70 images in one folder."""
    folder = tmp_path_factory.mktemp("flat")
    for number, image in image_bytes.items():
        (folder / f"{number:03d}.{'png' if number % 5 == 0 else 'jpg'}").write_bytes(image)
    return folder


@pytest.fixture(scope="session")
def unlabelled_cache(
    make_cache: Callable[..., Any], flat_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Features of a teacher without a classifier, of images without labels."""
    cache = tmp_path_factory.mktemp("unlabelled") / "cache"
    make_cache(
        cache, teacher=headless_teacher(), logits="none", data_dir=str(flat_folder), labels="none"
    )
    return cache
