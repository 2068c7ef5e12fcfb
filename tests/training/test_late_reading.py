"""What an accelerator computes is read one line of the log later, and nothing depends on it."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scalekd.training import Trainer, TrainingDiverged, TrainingInterrupted
from scalekd.training.checkpoint import Position
from scalekd.training.feed import on_device
from scalekd.training.guarded_step import GuardedStep
from scalekd.training.meter import Meter

Make = Callable[..., Trainer]
_READS = ("_local_scalar_dense", "is_nonzero", "equal.default", "nonzero.default")
_TIMES = {"time", "images_per_second", "data_wait_share"}


class Reads(TorchDispatchMode):
    """Counts operations that make a host wait for its device.

    Args:
        optimizer: Its step counters live on the host, where reading waits for nothing.
    """

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.count = 0
        self._optimizer = optimizer

    def _is_counter(self, value: Any) -> bool:
        if self._optimizer is None:
            return False
        states = [*self._optimizer.state.values(), *self._optimizer.param_groups]
        return any(value is state.get("step") for state in states)

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if any(name in str(function) for name in _READS):
            self.count += not self._is_counter(arguments[0])
        return function(*arguments, **(keywords or {}))


def lines(run: Path) -> list[dict[str, float]]:
    import json

    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_file(run / "last/model.safetensors")
    return state


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("log_interval", [1, 2, 4, 50])
def test_reading_reports_late_gives_the_same_run(
    make_trainer: Make, tmp_path: Path, opt: str, log_interval: int
) -> None:
    values = {"epochs": 2, "opt": opt, "log_interval": log_interval, "model_ema": True}
    make_trainer(tmp_path / "now", late=False, **values).fit()
    make_trainer(tmp_path / "late", late=True, **values).fit()
    now, late = weights(tmp_path / "now"), weights(tmp_path / "late")
    assert all(torch.equal(now[name], late[name]) for name in now)
    assert lines(tmp_path / "now") == lines(tmp_path / "late")


def test_a_late_run_that_is_interrupted_ends_the_same(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "whole", late=True, log_interval=4).fit()
    trainer = make_trainer(tmp_path / "run", late=True, log_interval=4)
    update = trainer._update

    def and_stop(*arguments: Any) -> Any:
        if trainer._position.num_updates == 8:
            trainer._stop.signal_number = 15
        return update(*arguments)

    trainer._update = and_stop  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted, match="after update 9"):
        trainer.fit()
    make_trainer(tmp_path / "run", late=True, log_interval=4, resume="auto").fit()
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    rows = [(tmp_path / run / "summary.csv").read_text() for run in ("whole", "run")]
    losses = [[row.split(",")[:3] for row in text.splitlines()] for text in rows]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
def test_an_update_reads_nothing_of_the_device(
    make_trainer: Make, tmp_path: Path, opt: str
) -> None:
    trainer = make_trainer(
        tmp_path / "run", late=True, epochs=1, opt=opt, log_interval=50, model_ema=True
    )
    update = trainer._update
    counts = []

    def counted(*arguments: Any) -> Any:
        with Reads(trainer._optimizer) as reads:
            result = update(*arguments)
        counts.append(reads.count)
        return result

    trainer._update = counted  # type: ignore[method-assign]
    trainer.fit()
    assert counts == [0] * 6
    # What the counter would see of a trainer that looks at once.
    with Reads() as reads:
        bool(torch.isfinite(torch.ones(())))
    assert reads.count == 1


def poison(trainer: Trainer, update: int) -> None:
    forward = trainer._forward

    def poisoned(batch: Any) -> Any:
        output = forward(batch)
        if trainer._position.num_updates == update:
            losses = dict(output.losses)
            losses["task_loss"] = losses["task_loss"] * float("nan")
            losses["total"] = losses["total"] + losses["task_loss"]
            return output._replace(losses=losses)
        return output

    trainer._forward = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("update", [0, 2, 5])
def test_the_device_skips_an_update_that_is_not_finite(
    make_trainer: Make, tmp_path: Path, opt: str, update: int
) -> None:
    trainer = make_trainer(tmp_path / "run", late=True, opt=opt, log_interval=2)
    poison(trainer, update)
    student = trainer._state.student
    before: list[dict[str, torch.Tensor]] = []
    step = trainer._update

    def kept(*arguments: Any) -> Any:
        before.append({name: p.detach().clone() for name, p in student.named_parameters()})
        return step(*arguments)

    trainer._update = kept  # type: ignore[method-assign]
    with pytest.raises(
        TrainingDiverged, match=rf"update {update + 1} \(epoch 1\): task_loss is nan"
    ):
        trainer.fit()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[update][name]), name
    # It was seen when the next line of the log was due, and no later.
    assert len(before) <= min(2 * (update // 2 + 2), 6)
    assert not (tmp_path / "run/last").exists()


def test_a_finite_sum_of_a_term_that_is_not_leaves_no_gradient(
    make_trainer: Make, tmp_path: Path
) -> None:
    """A loss may be infinite where its gradient is finite, and others see the gradient only."""
    trainer = make_trainer(tmp_path / "run", late=True, log_interval=1)
    forward = trainer._forward

    def infinite(batch: Any) -> Any:
        output = forward(batch)
        return output._replace(losses={**output.losses, "other_loss": torch.tensor(math.inf)})

    trainer._forward = infinite  # type: ignore[method-assign]
    norms = []
    trainer._clip_gradients = lambda clip=trainer._clip_gradients: norms.append(clip()) or norms[-1]  # type: ignore[method-assign,func-returns-value,misc]
    with pytest.raises(TrainingDiverged, match="other_loss is inf"):
        trainer.fit()
    assert torch.isnan(norms[0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_guarded_step_is_skipped_after_a_norm_that_is_not_finite(kind: Any, fused: bool) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = kind([parameter], lr=0.1, fused=fused)
    step = GuardedStep(optimizer, [parameter], scaled=False)
    seen = []
    for norm in (1.0, 2.0, math.inf, 1.0, math.nan):
        parameter.grad = torch.full((3,), norm)
        step(torch.tensor(norm))
        seen.append(parameter.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(later, seen[1]) for later in seen[2:])  # for good


def test_a_meter_gives_an_interval_back_when_the_next_one_ends() -> None:
    meter = Meter(2, late=True)
    given = []
    for update in range(1, 7):
        row = meter.add({"loss": torch.tensor(float(update)), "norm": torch.tensor(1.0)}, 4)
        assert meter.named(row) == {"loss": update, "norm": 1.0}
        if update % 2 == 0:
            meter.end(Position(num_updates=update), 0.1, logged=True)
        given.append([i.position.num_updates for i in meter.take()])
    assert given == [[], [], [], [2], [], [4]]
    (last,) = meter.take(everything=True)
    assert [values["loss"] for values in last.updates] == [5.0, 6.0]
    assert last.means().means() == {"loss": 5.5, "norm": 1.0}
    assert meter.epoch.means()["loss"] == 3.5


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_and_errors_arrive_in_order(ahead: int) -> None:
    asked = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for number in range(4):
            asked.append(number)
            yield {"n": torch.tensor(number)}
        raise ValueError("the fifth")

    feed = on_device(batches(), torch.device("cpu"), ahead=ahead)
    assert asked == []
    got = [int(next(feed)["n"])]
    assert asked == list(range(min(ahead + 1, 4)))
    got += [int(next(feed)["n"]) for _ in range(3)]
    assert got == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="the fifth"):
        next(feed)


def test_waiting_for_data_is_measured(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", late=True, epochs=1, log_interval=3)
    trainer._loader.before_batch = lambda epoch, number: time.sleep(0.05)  # type: ignore[attr-defined]
    trainer.fit()
    row = dict(
        zip(
            *(x.split(",") for x in (tmp_path / "run/summary.csv").read_text().splitlines()),
            strict=True,
        )
    )
    # The first batch is read before the clock starts.
    assert float(row["data_wait_share"]) * float(row["seconds"]) >= 5 * 0.05
