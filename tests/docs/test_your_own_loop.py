"""``docs/your-own-loop.md``, run as it is written."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.conftest import run_program

WEIGHTS = "resnet50.pt"

Weights = dict[str, Tensor]
Programs = dict[str, str]


@pytest.fixture(scope="module")
def loops(programs: Callable[[str, str], Programs]) -> Programs:
    return programs("docs/your-own-loop.md", "python")


def _run(code: str, folder: Path, *launcher: str) -> tuple[Weights, str]:
    """The student's weights that a program saves, and what it prints."""
    printed = run_program(code, folder, *launcher)
    return torch.load(folder / WEIGHTS, weights_only=True), printed


@pytest.fixture(scope="module")
def plain(loops: Programs, working_folder: Callable[[], Path]) -> tuple[Weights, str]:
    return _run(loops["plain"], working_folder())


def _same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_plain_loop_trains_a_timm_student(plain: tuple[Weights, str]) -> None:
    weights, printed = plain
    model = timm.create_model("resnet50", num_classes=10)
    before = model.fc.weight.clone()
    model.load_state_dict(weights)
    assert not torch.equal(model.fc.weight, before)
    assert weights["bn1.num_batches_tracked"] == 4  # 70 views in batches of 32, two epochs
    assert [line.split(":")[0] for line in printed.splitlines()] == ["epoch 0", "epoch 1"]


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_the_other_loops_end_with_the_same_student(
    name: str, loops: Programs, working_folder: Callable[[], Path], plain: tuple[Weights, str]
) -> None:
    weights, _ = _run(loops[name], working_folder())
    assert _same(weights, plain[0])


@pytest.mark.slow
def test_two_processes_of_the_accelerate_loop_train_one_student(
    loops: Programs, working_folder: Callable[[], Path], plain: tuple[Weights, str]
) -> None:
    saving = f'torch.save(student.model.state_dict(), f"{{rank}}-{WEIGHTS}")\n'
    folder = working_folder()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    weights, _ = _run(loops["accelerate"] + saving, folder, *torchrun)
    assert weights["bn1.num_batches_tracked"] == 2  # one batch an epoch on each process
    first, second = (torch.load(folder / f"{r}-{WEIGHTS}", weights_only=True) for r in (0, 1))
    trained = [n for n, _ in timm.create_model("resnet50", num_classes=10).named_parameters()]
    assert all(torch.equal(first[name], second[name]) for name in trained)


def test_the_loop_with_a_live_teacher_brings_the_student_closer(loops: Programs) -> None:
    published = 'TeacherConfig(model="swin_s", pretrained=True)'
    code = loops["live"]
    assert code.count(published) == 1
    swin = {"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
    code = code.replace(
        published,
        f"TeacherConfig(model='swin_tiny_patch4_window7_224', pretrained=False,"
        f" model_kwargs={swin})",
    )
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    history: list[dict[str, float]] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(4):
            yield pixels, torch.tensor([0, 3])
            history.append({name: loss.item() for name, loss in program["losses"].items()})

    program: dict[str, Any] = {"loader": batches()}
    exec(compile(code, "docs/your-own-loop.md", "exec"), program)  # noqa: S102 (our own document)
    # A random teacher contradicts the labels, so that the logit loss may well rise.
    falling = ["total", *(name for name in history[0] if name.startswith("stage"))]
    assert len(falling) == 5
    assert all(history[-1][name] < history[0][name] for name in falling), history
