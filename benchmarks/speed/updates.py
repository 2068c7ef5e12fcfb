"""How often does an update wait for its device, or for another process?

Two processes train a small student together as on accelerators: what they compute is read one line
of the log later. Counted, not timed: operations that hand a value of the device to the host, and
exchanges between the processes beside the gradients' own, over the updates within an epoch.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed._measure import Settings
from scalekd.distillation import build_objective
from scalekd.distributed import Coordinator
from scalekd.students import create_student
from scalekd.training import DistillationModule, NoTargets, TrainConfig, Trainer
from scalekd.training.accelerator import make_accelerator

_PROCESSES = 2
_LOG_INTERVAL = 50  # the default
_READS = ("_local_scalar_dense", "is_nonzero", "equal.default", "nonzero.default")


class DeviceReads(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        self.count += any(name in str(function) for name in _READS)
        return function(*arguments, **(keywords or {}))


class _Batches:
    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[dict[str, Tensor]]:
        for number in range(start_batch, self.num_batches):
            random = torch.Generator().manual_seed(number)
            pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
            yield {"pixels": pixels, "label": torch.randint(0, 4, (4,), generator=random)}


def run(settings: Settings) -> dict[str, Any]:
    num_updates = 100 if settings.quick else 500
    reads, agreements = count(num_updates)
    return {
        "processes": _PROCESSES,
        "updates": num_updates,
        "log_interval": _LOG_INTERVAL,
        "reads_per_update": reads,
        "agreements_per_update": agreements,
    }


def count(num_updates: int) -> tuple[float, float]:
    """Count device reads and agreements per update; return the larger of both processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        multiprocessing.spawn(_train, (port, num_updates, folder), nprocs=_PROCESSES)
        counts = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return max(each[0] for each in counts), max(each[1] for each in counts)


def _train(rank: int, port: int, num_updates: int, folder: str) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": _PROCESSES, "MASTER_PORT": port}
    os.environ.update(
        {name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1"
    )
    torch.set_num_threads(1)
    config = TrainConfig(
        model="test_resnet",
        objective="none",
        opt="sgd",  # the step counters of others live on the host, and are read there
        amp="no",
        epochs=1,
        batch_size=4,
        log_interval=_LOG_INTERVAL,
        output=f"{folder}/run",
        workers=0,
    )
    student = create_student("test_resnet", num_classes=4, img_size=32)
    trainer = Trainer(
        config,
        accelerator=make_accelerator(config.amp),
        module=DistillationModule(
            student, build_objective("none"), mean=student.spec.mean, std=student.spec.std
        ),
        loader=_Batches(num_updates + 1),
        targets=NoTargets(),
        late=True,
    )
    reads, agreements = DeviceReads(), _count_agreements()
    update, counts = trainer._update, []

    def counted(num_micro_batches: int) -> int:
        counts.append(len(agreements))  # before this update, so after the one before
        with reads:
            return update(num_micro_batches)

    trainer._update = counted  # type: ignore[method-assign]
    trainer.fit()
    # The last update ends the epoch, with exchanges of its own.
    result = (reads.count / len(counts), (counts[-1] - counts[0]) / (len(counts) - 1))
    torch.save(result, Path(folder) / f"{rank}.pt")


def _count_agreements() -> list[str]:
    """A list that grows with every exchange between processes from now on."""
    seen: list[str] = []

    def counted(name: str) -> None:
        original = getattr(Coordinator, name)

        def method(self: Coordinator, value: Any) -> Any:
            seen.append(name)
            return original(self, value)

        setattr(Coordinator, name, method)

    counted("maximum")
    counted("collect")
    return seen
