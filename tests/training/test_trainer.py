import csv
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.training import Trainer, TrainingDiverged, TrainingInterrupted, freeze_parameters
from scalekd.training import optim as optim_module
from scalekd.training.checkpoint import STUDENT_FILE, read_checkpoint

Make = Callable[..., Trainer]
TIMES = ("seconds", "images_per_second", "data_wait_share")


def stop_after(trainer: Trainer, *updates: int) -> None:
    """Ask the trainer to stop, as a signal would, once it has made so many updates."""
    update = trainer._update

    def and_stop(*arguments: Any) -> Any:
        result = update(*arguments)
        if trainer._position.num_updates + 1 in updates:
            trainer._stop.signal_number = signal.SIGTERM
        return result

    trainer._update = and_stop


def crash_after(trainer: Trainer, update: int) -> None:
    """Let the process end without a word once it has made so many updates."""
    make = trainer._update

    def and_crash(*arguments: Any) -> Any:
        result = make(*arguments)
        if trainer._position.num_updates + 1 == update:
            raise ConnectionResetError("the machine is gone")
        return result

    trainer._update = and_crash


def weights(run: Path, name: str = STUDENT_FILE) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / name)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name not in TIMES}
            for row in csv.DictReader(file)
        ]


def steps(run: Path) -> list[dict[str, float]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in (*TIMES, "time")} for line in lines
    ]


def test_a_student_learns(make_trainer: Make, tmp_path: Path) -> None:
    result = make_trainer(tmp_path / "run", epochs=6, drop_path=0).fit()
    first, *_, last = rows(tmp_path / "run")
    assert float(last["train_loss"]) < 0.5 * float(first["train_loss"])
    assert float(last["train_top1"]) > 80
    assert result.samples_viewed == 6 * 6 * 8 == int(float(last["samples_viewed"]))


def test_a_student_learns_from_logits_and_agrees_with_the_teacher(
    make_trainer: Make, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    make_trainer(run, objective="kd", epochs=6, drop_path=0).fit()
    last = rows(run)[-1]
    assert float(last["train_teacher_agreement"]) > 80
    total = float(last["train_task_loss"]) + float(last["train_kd_loss"])
    assert float(last["train_loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"model_ema": True, "opt": "adamw", "clip_grad": 1.0},
        {"grad_accum_steps": 4, "opt": "lamb", "sched_on_updates": True, "warmup_epochs": 1},
        {"opt": "lookahead_sgd", "sched": "step", "decay_epochs": 1, "objective": "kd"},
    ],
    ids=["adamw-ema", "lamb-accumulated", "lookahead-step"],
)
def test_an_interrupted_run_ends_bit_for_bit_the_same(
    make_trainer: Make, tmp_path: Path, values: dict[str, Any]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make_trainer(whole, **values).fit()
    for stop in (1, 3, 5, None):
        trainer = make_trainer(broken, resume="auto", **values)
        torch.rand(7)  # whatever the process drew before must not matter
        if stop is None:
            trainer.fit()
        else:
            stop_after(trainer, stop)
            with pytest.raises(TrainingInterrupted, match="--resume auto"):
                trainer.fit()
    assert equal(weights(whole), weights(broken))
    if "model_ema" in values:
        averages = weights(whole, "ema.safetensors")
        assert equal(averages, weights(broken, "ema.safetensors"))
        assert not equal(averages, weights(whole))
    assert rows(whole) == rows(broken)
    last_of_each_epoch = {step["epoch"]: step["step"] for step in steps(whole)}
    assert {step["epoch"]: step["step"] for step in steps(broken)} == last_of_each_epoch
    numbers = [step["step"] for step in steps(broken)]
    assert numbers == sorted(set(numbers))


def test_a_resumed_epoch_reads_no_batch_twice(make_trainer: Make, tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "run")
    stop_after(first, 8)
    with pytest.raises(TrainingInterrupted):
        first.fit()
    second = make_trainer(tmp_path / "run", resume="auto")
    second.fit()
    trained_on = [*first._loader.read[:8], *second._loader.read]
    assert trained_on == [(epoch, number) for epoch in range(3) for number in range(6)]


def test_a_run_that_crashed_between_checkpoints_ends_with_the_same_weights(
    make_trainer: Make, tmp_path: Path
) -> None:
    make_trainer(tmp_path / "whole").fit()
    trainer = make_trainer(tmp_path / "run", recovery_interval=2)
    update = trainer._update

    def crash(*arguments: Any) -> Any:
        if trainer._position.num_updates == 9:
            raise RuntimeError("power cut")
        return update(*arguments)

    trainer._update = crash
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit()
    assert read_checkpoint(tmp_path / "run/last").position.num_updates == 8
    make_trainer(tmp_path / "run", recovery_interval=2, resume="auto").fit()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


def test_sigterm_writes_a_checkpoint_and_exits_with_its_number(
    make_trainer: Make, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run")
    handler = signal.getsignal(signal.SIGTERM)

    def preempt(epoch: int, number: int) -> None:
        if (epoch, number) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._loader.before_batch = preempt
    with pytest.raises(TrainingInterrupted, match="after update 9") as caught:
        trainer.fit()
    assert caught.value.exit_code == 143
    assert read_checkpoint(tmp_path / "run/last").position.num_updates == 9
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("term", ["task_loss", "kd_loss"])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    make_trainer: Make, tmp_path: Path, term: str
) -> None:
    trainer = make_trainer(tmp_path / "run", objective="kd", recovery_interval=1)
    forward = trainer._forward

    def poisoned(batch: Any) -> Any:
        output = forward(batch)
        if trainer._position.num_updates == 7:
            losses = dict(output.losses)
            losses[term] = losses[term] * float("nan")
            losses["total"] = losses["total"] + losses[term]
            return output._replace(losses=losses)
        return output

    trainer._forward = poisoned
    with pytest.raises(
        TrainingDiverged, match=rf"update 8 \(epoch 2\): {term} is nan.*checkpoint is .*last$"
    ):
        trainer.fit()
    untouched = weights(tmp_path / "run")
    now = trainer._state.student.state_dict()
    trained = [name for name, _ in trainer._state.student.named_parameters()]
    assert all(torch.equal(untouched[name], now[name]) for name in trained)


def test_an_infinite_gradient_stops_before_the_update(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    parameter = next(trainer._state.student.parameters())
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingDiverged, match=r"gradient's norm.*there is no checkpoint yet"):
        trainer.fit()


def test_the_gradient_norm_logged_is_that_before_clipping(
    make_trainer: Make, tmp_path: Path
) -> None:
    make_trainer(tmp_path / "free", epochs=1, opt="sgd", lr=1e-12).fit()
    trainer = make_trainer(tmp_path / "clipped", epochs=1, opt="sgd", lr=1e-12, clip_grad=0.01)
    norms = []
    step = trainer._optimizer.step

    def and_measure() -> None:
        gradients = [p.grad for p in trainer._trainable]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        step()

    trainer._optimizer.step = and_measure
    trainer.fit()
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    free, clipped = rows(tmp_path / "free")[0], rows(tmp_path / "clipped")[0]
    assert float(free["train_grad_norm"]) == pytest.approx(
        float(clipped["train_grad_norm"]), rel=1e-3
    )


def test_adaptive_clipping_spares_both_heads_of_a_distilled_student(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped: list[int] = []
    clip = optim_module.adaptive_clip_grad

    def note(parameters: list[nn.Parameter], limit: float) -> None:
        clipped.extend(id(parameter) for parameter in parameters)
        clip(parameters, limit)

    monkeypatch.setattr(optim_module, "adaptive_clip_grad", note)
    trainer = make_trainer(
        tmp_path / "run",
        model="deit_tiny_distilled_patch16_224",
        epochs=1,
        clip_mode="agc",
        clip_grad=0.1,
        drop_path=0.0,
    )
    trainer._num_batches = 1
    trainer.fit()
    student = trainer._state.student
    spared = {name for name, p in student.named_parameters() if id(p) not in clipped}
    assert spared == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_an_update_that_the_scaler_skips_leaves_logs_finite(
    make_trainer: Make, tmp_path: Path
) -> None:
    """Under fp16 the first gradients overflow, as the scale is found by trial."""
    make_trainer(tmp_path / "whole", epochs=1, log_interval=1).fit()
    trainer = make_trainer(tmp_path / "run", epochs=1, log_interval=1)
    clip = trainer._clip_gradients
    trainer._check_finite = lambda values: None
    trainer._clip_gradients = lambda: (
        clip() * (float("inf") if trainer._position.num_updates == 0 else 1)
    )
    trainer.fit()
    found, expected = steps(tmp_path / "run"), steps(tmp_path / "whole")
    norms = [step.pop("grad_norm") for step in expected]
    assert "Infinity" not in (tmp_path / "run/log.jsonl").read_text()
    assert [step.pop("grad_norm", None) for step in found] == [None, *norms[1:]]
    assert found == expected
    mean = float(rows(tmp_path / "run")[0]["train_grad_norm"])
    assert mean == pytest.approx(sum(norms[1:]) / 5, rel=1e-5)


def test_accumulation_equals_one_large_batch(make_trainer: Make, tmp_path: Path) -> None:
    # Without batch norm the mean of gradients is the gradient of the mean.
    values = {"model": "test_vit", "opt": "sgd", "epochs": 1, "weight_decay": 0}
    small = make_trainer(tmp_path / "a", grad_accum_steps=2, drop_path=0.0, **values)
    small._module.double()  # rounding is then 1e-16 of the terms of a sum, on any processor
    small.fit()

    class Doubled:
        num_batches = 3

        def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[dict[str, torch.Tensor]]:
            halves = list(type(small._loader)().epoch(epoch))
            for pair in zip(halves[::2], halves[1::2], strict=True):
                yield {name: torch.cat([half[name] for half in pair]) for name in pair[0]}

    large = make_trainer(tmp_path / "b", loader=Doubled(), batch_size=16, drop_path=0.0, **values)
    large._module.double()
    large.fit()
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-11)


def test_the_best_epochs_are_kept_and_no_more(make_trainer: Make, tmp_path: Path) -> None:
    scores = iter([10.0, 40.0, 20.0, 40.0, 30.0])
    result = make_trainer(
        tmp_path / "run",
        epochs=5,
        checkpoint_hist=2,
        evaluate=lambda model: {"top1": np.float64(next(scores))},
    ).fit()
    read_checkpoint(tmp_path / "run/last")  # whatever numbers an evaluation returns
    assert (result.best_epoch, result.best_metric) == (1, 40.0)
    kept = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert kept == ["checkpoint-1", "checkpoint-3", "last", "model_best"]
    best = json.loads((tmp_path / "run/model_best/state.json").read_text())
    assert best["metrics"]["eval_top1"] == 40.0
    assert best["epoch"] == 2


def test_the_average_is_evaluated_as_well_as_the_student(
    make_trainer: Make, tmp_path: Path
) -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model)
        return {"top1": float(len(seen))}

    trainer = make_trainer(tmp_path / "run", epochs=1, model_ema=True, evaluate=evaluate)
    trainer.fit()
    assert seen == [trainer._state.student, trainer._ema.module]
    row = rows(tmp_path / "run")[0]
    assert (float(row["eval_top1"]), float(row["ema_eval_top1"])) == (1, 2)


def test_the_average_starts_from_the_first_update(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", model_ema=True)
    stop_after(trainer, 1)
    with pytest.raises(TrainingInterrupted):
        trainer.fit()  # not from the random weights, which a slow average would never forget
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "run", "ema.safetensors"))


def test_evaluation_does_not_change_the_weights(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "without").fit()
    make_trainer(
        tmp_path / "with", evaluate=lambda model: {"top1": float(torch.rand(3).sum())}
    ).fit()
    assert equal(weights(tmp_path / "without"), weights(tmp_path / "with"))


def test_an_evaluation_that_fails_or_is_interrupted_loses_no_update(
    make_trainer: Make, tmp_path: Path
) -> None:
    """Epoch 1 meets a corrupt image twice; a signal comes with the last update of epoch 2."""
    values = {"objective": "kd", "model_ema": True, "sched_on_updates": True, "grad_accum_steps": 4}

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"top1": float(sum(p.detach().double().sum() for p in model.parameters()))}

    def corrupt(model: nn.Module) -> dict[str, float]:
        torch.rand(3)
        raise DataError("sample cat/3 cannot be decoded")

    whole, run = tmp_path / "whole", tmp_path / "run"
    make_trainer(whole, evaluate=evaluate, **values).fit()
    read = []
    for _ in range(2):
        trainer = make_trainer(run, evaluate=corrupt, resume="auto", **values)
        with pytest.raises(DataError, match="cat/3"):
            trainer.fit()
        read.append(trainer._loader.read)
    trainer = make_trainer(run, evaluate=evaluate, resume="auto", **values)
    stop_after(trainer, 4)  # two updates an epoch
    with pytest.raises(TrainingInterrupted, match="after update 4"):
        trainer.fit()
    assert [row["epoch"] for row in rows(run)] == ["0"]
    last = make_trainer(run, evaluate=evaluate, resume="auto", **values)
    last.fit()
    read += [trainer._loader.read, last._loader.read]
    assert read == [[(epoch, n) for n in range(6)] for epoch in (0,)] + [
        [],
        [(1, n) for n in range(6)],
        [(2, n) for n in range(6)],
    ]
    assert rows(run) == rows(whole)
    assert steps(run) == steps(whole)
    for name in (STUDENT_FILE, "ema.safetensors"):
        assert equal(weights(run, name), weights(whole, name))
    first, second = (read_checkpoint(path / "last") for path in (whole, run))
    assert first.position == second.position
    for name in ("metric_by_epoch", "epoch"):
        assert first.training["meters"][name] == second.training["meters"][name]


def test_a_trained_epoch_is_evaluated_under_another_batch_size_too(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def corrupt(model: nn.Module) -> dict[str, float]:
        raise DataError("sample cat/3 cannot be decoded")

    with pytest.raises(DataError):
        make_trainer(tmp_path / "run", epochs=1, evaluate=corrupt).fit()
    again: dict[str, Any] = {"evaluate": lambda model: {"top1": 5.0}, "resume": "auto"}
    trainer = make_trainer(tmp_path / "run", epochs=1, batch_size=20, **again)
    trainer._num_batches = 2  # 48 views are two batches of 20, and 8 that are left out
    assert trainer.fit().samples_viewed == 48
    assert trainer._loader.read == []
    assert "second time" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("copy", "epoch", "missing"),
    [
        ("keep_best", 0, "model_best"),
        ("keep_epoch", 0, "checkpoint-0"),
        ("keep_epoch", 2, "checkpoint-2"),
    ],
)
def test_copies_of_checkpoints_that_a_kill_prevented_are_made_on_resume(
    make_trainer: Make, tmp_path: Path, copy: str, epoch: int, missing: str
) -> None:
    """The process is killed once ``last`` is written, and again before it trains on."""
    run, scores = tmp_path / "run", [40.0, 30.0, 20.0]
    values: dict[str, Any] = {"resume": "auto"}

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    trainer = make_trainer(
        run, evaluate=lambda model: {"top1": scores[trainer._position.epoch]}, **values
    )
    keep = getattr(trainer._run, copy)
    setattr(
        trainer._run,
        copy,
        lambda *given: (killed if trainer._position.epoch == epoch + 1 else keep)(*given),
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert not (run / missing).exists()
    again = make_trainer(run, **values)
    again._train_epoch = killed
    if epoch < 2:
        with pytest.raises(KeyboardInterrupt):
            again.fit()
    else:
        again.fit()
    kept = {"model_best": 0} | {f"checkpoint-{number}": number for number in range(epoch + 1)}
    assert {path.name for path in run.iterdir() if path.is_dir()} == {*kept, "last"}
    for name, number in kept.items():
        state = json.loads((run / name / "state.json").read_text())
        assert state["metrics"]["eval_top1"] == scores[number], name


def test_a_run_is_not_continued_with_another_teacher_or_other_images(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"teacher_weights_sha256": 64 * "a", "data_fingerprint": 32 * "b", "cache_id": "one"}

    def fit(objective: str, epochs: int, **changes: str) -> None:
        trainer = make_trainer(
            tmp_path / objective, epochs=epochs, resume="auto", cache="moved", objective=objective
        )
        trainer._facts |= {**facts, **changes}
        trainer.fit()

    for objective in ("none", "kd"):
        fit(objective, 1)
        with pytest.raises(CacheMismatch, match=r"last: .* images are bbbbbbbbbbbb…, .* of moved"):
            fit(objective, 2, data_fingerprint=32 * "c")
        fit(objective, 1, cache_id="two")
        assert "cache_id was 'one' and is now 'two'" in capsys.readouterr().err
    fit("none", 2, teacher_weights_sha256=64 * "d")  # it learns from labels alone
    with pytest.raises(CacheMismatch, match=r"weights are a{12}…, .* are d{12}…; give --cache"):
        fit("kd", 2, teacher_weights_sha256=64 * "d")


def test_a_run_is_continued_only_on_request(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", epochs=1).fit()
    with pytest.raises(UsageError, match="--resume auto"):
        make_trainer(tmp_path / "run", epochs=1).fit()


def test_a_folder_with_other_files_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="contains something that is not a training run"):
        make_trainer(tmp_path, resume="auto").fit()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_resumed_run_may_have_more_epochs_but_not_another_model(
    make_trainer: Make, tmp_path: Path
) -> None:
    make_trainer(tmp_path / "run", epochs=1).fit()
    result = make_trainer(tmp_path / "run", epochs=2, resume="auto").fit()
    assert result.epochs == 2
    with pytest.raises(UsageError, match=r"has opt = 'adamw' and cannot continue with 'sgd'"):
        make_trainer(tmp_path / "run", epochs=2, opt="sgd", resume="auto").fit()


def test_another_batch_size_continues_at_the_same_view(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_trainer(tmp_path / "run", epochs=1)
    stop_after(first, 3)  # 24 views
    with pytest.raises(TrainingInterrupted):
        first.fit()
    loader = type(first._loader)(num_batches=3, batch_size=16)
    result = make_trainer(
        tmp_path / "run", epochs=1, batch_size=16, resume="auto", loader=loader
    ).fit()
    assert loader.read == [(0, 1), (0, 2)]  # 16 of the 24 views are skipped, 8 come again
    assert result.samples_viewed == 24 + 32
    assert "8 views of this epoch are trained on a second time" in " ".join(
        capsys.readouterr().err.split()
    )


def test_another_batch_size_keeps_the_position_in_the_schedule(
    make_trainer: Make, tmp_path: Path
) -> None:
    values = {"epochs": 4, "warmup_epochs": 1, "sched_on_updates": True, "drop_path": 0}

    def large() -> Any:
        return type(make_trainer(tmp_path / "unused")._loader)(num_batches=3, batch_size=16)

    make_trainer(tmp_path / "whole", batch_size=16, loader=large(), **values).fit()
    first = make_trainer(tmp_path / "run", **values)
    stop_after(first, 14)  # in the third of four epochs
    with pytest.raises(TrainingInterrupted):
        first.fit()
    again = {**values, "batch_size": 16, "resume": "auto"}
    make_trainer(tmp_path / "run", loader=large(), **again).fit()
    whole, run = ([float(row["lr"]) for row in rows(tmp_path / name)] for name in ("whole", "run"))
    assert run[2:] == whole[2:]
    assert whole[0] > whole[1] > whole[2] > 0


@pytest.mark.parametrize("seed", range(4))
def test_stops_and_crashes_at_random_updates_give_the_same_weights(
    make_trainer: Make, tmp_path: Path, seed: int
) -> None:
    """18 updates in five parts, each of which was asked to stop or simply ended."""
    random = np.random.default_rng(seed)
    values = {
        "objective": "kd",
        "model_ema": bool(random.integers(2)),
        "opt": str(random.choice(["adamw", "lamb", "sgd"])),
        "sched_on_updates": bool(random.integers(2)),
        "recovery_interval": int(random.integers(1, 4)),
    }
    make_trainer(tmp_path / "whole", **values).fit()
    for end in sorted(random.choice(np.arange(1, 18), 4, replace=False).tolist()):
        trainer = make_trainer(tmp_path / "run", resume="auto", **values)
        (stop_after if random.integers(2) else crash_after)(trainer, end)
        torch.rand(5)  # whatever the process drew before must not matter
        with pytest.raises((TrainingInterrupted, ConnectionResetError)):
            trainer.fit()
    make_trainer(tmp_path / "run", resume="auto", **values).fit()
    for name in (STUDENT_FILE, *(["ema.safetensors"] if values["model_ema"] else [])):
        assert equal(weights(tmp_path / "whole", name), weights(tmp_path / "run", name)), values
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


def test_resuming_a_finished_run_trains_nothing(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", epochs=2).fit()
    before = weights(tmp_path / "run")
    again = make_trainer(tmp_path / "run", epochs=2, resume="auto")
    result = again.fit()
    assert again._loader.read == []
    assert result.epochs == 2
    assert result.metrics["epoch"] == 1
    assert equal(before, weights(tmp_path / "run"))


def test_a_damaged_checkpoint_is_named(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", epochs=1).fit()
    (tmp_path / "run/last/training_state.pt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(
        DataError, match=r"last: the checkpoint cannot be read \(ValueError: training"
    ):
        make_trainer(tmp_path / "run", epochs=2, resume=str(tmp_path / "run/last")).fit()


def test_a_frozen_part_does_not_change(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "reference", epochs=1)
    student = trainer._state.student
    freeze_parameters(student, ["layer1", "conv1*", "bn1"])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer.fit()
    after = student.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert "layer2" in changed
    assert not changed & {"layer1", "conv1", "bn1"}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it traces
def test_checkpoints_of_compiled_students_have_the_usual_names(
    make_trainer: Make, tmp_path: Path
) -> None:
    values = {"epochs": 1, "drop_path": 0.0, "model_ema": True}
    make_trainer(tmp_path / "plain", **values).fit()
    make_trainer(tmp_path / "compiled", torchcompile="eager", **values).fit()
    for name in (STUDENT_FILE, "ema.safetensors"):
        plain, compiled = (weights(tmp_path / run, name) for run in ("plain", "compiled"))
        assert plain.keys() == compiled.keys()
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amp", ["bf16"])
def test_reduced_precision_trains_on_a_cpu(make_trainer: Make, tmp_path: Path, amp: str) -> None:
    make_trainer(tmp_path / "run", amp=amp, epochs=1, channels_last=True).fit()
    state = weights(tmp_path / "run")
    assert all(tensor.dtype != torch.bfloat16 for tensor in state.values())
    assert torch.isfinite(state["fc.weight"]).all()
