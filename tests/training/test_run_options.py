"""What single options do to a real run: losses, clipping, memory layout, precision, compilation."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.training import TrainConfig, Trainer, TrainingInterrupted, is_convolutional
from scalekd.training.accelerator import make_accelerator
from scalekd.training.checkpoint import read_checkpoint
from scalekd.training.config import default_workers

Make = Callable[..., Trainer]


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def first_batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Logits of the untrained student, as it trains, and labels."""
    batch = next(iter(trainer._loader.epoch(0)))
    trainer._module.train()
    with torch.no_grad():
        images = trainer._module.normalise(batch["pixels"])
        return trainer._module.student(images).logits, batch["label"]


@pytest.mark.parametrize("name", ["bce", "smoothing", "both"])
def test_the_task_loss_is_the_requested_one(make_trainer: Make, tmp_path: Path, name: str) -> None:
    options = {"bce_loss": name != "smoothing", "smoothing": 0.0 if name == "bce" else 0.2}
    options |= {"drop_path": 0.0, "log_interval": 1, "epochs": 4}
    logits, labels = first_batch(make_trainer(tmp_path / "twin", **options))
    hard = F.one_hot(labels, 4).float()
    soft = hard * (1 - options["smoothing"]) + options["smoothing"] / 4
    if options["bce_loss"]:
        terms = -(soft * F.logsigmoid(logits) + (1 - soft) * F.logsigmoid(-logits))
    else:
        terms = -soft * logits.log_softmax(dim=1)
    make_trainer(tmp_path / "run", **options).fit()
    first, *_, last = steps(tmp_path / "run")
    assert first["task_loss"] == pytest.approx(float(terms.sum(dim=1).mean()), rel=1e-5)
    assert last["task_loss"] < first["task_loss"]


def gradients_at_steps(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Train, and return the gradients as the optimiser gets them."""
    seen: list[dict[str, Tensor]] = []
    step, student = trainer._optimizer.step, trainer._state.student

    def and_note() -> None:
        seen.append({name: p.grad.clone() for name, p in student.named_parameters()})
        step()

    trainer._optimizer.step = and_note
    trainer.fit()
    return seen


def test_clipping_by_value_cuts_single_gradients(make_trainer: Make, tmp_path: Path) -> None:
    still = {"epochs": 1, "opt": "sgd", "lr": 1e-12, "drop_path": 0.0}
    free = gradients_at_steps(make_trainer(tmp_path / "free", **still))
    cut = gradients_at_steps(
        make_trainer(tmp_path / "cut", clip_grad=1e-3, clip_mode="value", **still)
    )
    assert all(float(g.abs().max()) < 1.001e-3 for gradients in cut for g in gradients.values())
    # Later ones see other weights, if by no more than 1e-12, and a ReLU may have its kink there.
    before, after = free[0], cut[0]
    assert max(float(g.abs().max()) for g in before.values()) > 1e-3
    for name in before:
        torch.testing.assert_close(after[name], before[name].clamp(-1e-3, 1e-3))


def test_adaptive_clipping_follows_the_weights_and_spares_the_head(
    make_trainer: Make, tmp_path: Path
) -> None:
    def norms(tensor: Tensor) -> Tensor:
        return tensor.flatten(1).norm(dim=1) if tensor.ndim > 1 else tensor.norm()[None]

    still = {"epochs": 1, "opt": "sgd", "lr": 1e-12, "drop_path": 0.0}
    free = gradients_at_steps(make_trainer(tmp_path / "free", **still))
    trainer = make_trainer(tmp_path / "cut", clip_grad=0.01, clip_mode="agc", **still)
    weights = {name: p.detach().clone() for name, p in trainer._state.student.named_parameters()}
    num_cut = 0
    for before, after in zip(free, gradients_at_steps(trainer), strict=True):
        for name, weight in weights.items():
            if name.startswith("fc."):
                torch.testing.assert_close(after[name], before[name])
                continue
            limit = 0.01 * norms(weight).clamp(min=1e-3)
            assert (norms(after[name]) <= limit * 1.001).all()
            num_cut += int((norms(before[name]) > limit).sum())
    assert num_cut > 0


def test_channels_last_reaches_the_student_and_changes_no_value(
    make_trainer: Make, tmp_path: Path
) -> None:
    options = {"epochs": 1, "drop_path": 0.0, "opt": "sgd"}
    # In float64 other orders of the same sums differ by about 1e-16 of their terms, on any
    # processor; in float32 a bias was seen to differ by 1.1e-5 on one with AVX-512.
    plain_trainer = make_trainer(tmp_path / "plain", **options)
    plain_trainer._module.double()
    plain_trainer.fit()
    trainer = make_trainer(tmp_path / "last", channels_last=True, **options)
    trainer._module.double()
    layouts = []
    trainer._state.student.conv1[0].register_forward_pre_hook(
        lambda module, arguments: layouts.append(
            arguments[0].is_contiguous(memory_format=torch.channels_last)
            and module.weight.is_contiguous(memory_format=torch.channels_last)
        )
    )
    trainer.fit()
    assert layouts == [True] * 6
    plain, last = (
        load_file(tmp_path / run / "last/model.safetensors") for run in ("plain", "last")
    )
    torch.testing.assert_close(last, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", True),
        ("mobilenetv1_100", True),
        ("convnext_atto", True),
        ("efficientnet_b0", True),
        ("vit_tiny_patch16_224", False),
        ("swin_tiny_patch4_window7_224", False),
        ("mixer_s32_224", False),
    ],
)
def test_cnns_are_recognised(name: str, expected: bool) -> None:
    assert is_convolutional(timm.create_model(name, device="meta")) == expected


class ScalingAccelerator(Accelerator):
    """Half precision with a loss scaler on the CPU, where Accelerate has none."""

    def __init__(self) -> None:
        AcceleratorState._reset_state()
        super().__init__(cpu=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=4)
        self.native_amp = True
        self.state._mixed_precision = "fp16"


@pytest.fixture
def make_scaling_trainer(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    def make(output: Path, **values: Any) -> Trainer:
        with monkeypatch.context() as patch:
            made = make_trainer.__globals__  # type: ignore[attr-defined]
            patch.setitem(made, "Accelerator", lambda **_: ScalingAccelerator())
            return make_trainer(output, **values)

    return make


def test_the_loss_scale_resumes_exactly(make_scaling_trainer: Make, tmp_path: Path) -> None:
    whole = make_scaling_trainer(tmp_path / "whole")
    assert whole._accelerator.scaler is not None
    whole.fit()
    scale = read_checkpoint(tmp_path / "whole/last").training["scaler"]
    assert scale["scale"] == 2.0**6 * 2**4  # doubled after each four of the 18 updates
    assert scale["_growth_tracker"] == 2
    for stop in (6, 11, None):
        trainer = make_scaling_trainer(tmp_path / "broken", resume="auto")
        if stop is None:
            trainer.fit()
            continue
        loader = trainer._loader
        loader.before_batch = lambda epoch, number, trainer=trainer, stop=stop: (
            setattr(trainer._stop, "signal_number", 15)
            if trainer._position.num_updates + 1 == stop
            else None
        )
        with pytest.raises(TrainingInterrupted):
            trainer.fit()
    assert read_checkpoint(tmp_path / "broken/last").training["scaler"] == scale
    first, second = (
        load_file(tmp_path / run / "last/model.safetensors") for run in ("whole", "broken")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_overflow_skips_the_update_and_halves_the_scale(
    make_scaling_trainer: Make, tmp_path: Path
) -> None:
    trainer = make_scaling_trainer(tmp_path / "run", epochs=1)
    student, seen = trainer._state.student, []
    parameter = student.fc.weight
    parameter.register_hook(
        lambda gradient: gradient * (float("inf") if trainer._position.num_updates == 2 else 1)
    )
    step = trainer._optimizer.step

    def and_compare() -> None:
        before = parameter.detach().clone()
        step()
        seen.append((torch.equal(before, parameter), trainer._accelerator.scaler.get_scale()))

    trainer._optimizer.step = and_compare
    trainer.fit()
    assert [same for same, _ in seen] == [False, False, True, False, False, False]
    assert [scale for _, scale in seen][:4] == [64, 64, 32, 32]
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_a_warm_up_that_would_not_end_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    for warmup in (3, 4, 100):
        with pytest.raises(UsageError, match=rf"--warmup-epochs {warmup}: .* --epochs 3"):
            make_trainer(tmp_path / "run", epochs=3, warmup_epochs=warmup)
    make_trainer(tmp_path / "run", epochs=3, warmup_epochs=2.5)
    assert (
        make_trainer(tmp_path / "a", epochs=3, warmup_epochs=4, warmup_prefix=True).num_epochs == 7
    )
    make_trainer(tmp_path / "run", epochs=3, warmup_epochs=4, sched="none")


def test_one_view_a_batch_is_refused_where_a_norm_needs_two(
    make_trainer: Make, tmp_path: Path
) -> None:
    loader = make_trainer.__globals__["SeededLoader"](batch_size=1)  # type: ignore[attr-defined]
    trainer = make_trainer(tmp_path / "run", batch_size=1, loader=loader)
    with pytest.raises(UsageError, match=r"--batch-size 1: batch normalisation .* 1 x 1"):
        trainer.fit()


def test_half_precision_without_a_device_for_it_is_one_line(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has such a device")
    config = TrainConfig(model="test_resnet", output=str(tmp_path), amp="fp16")
    with pytest.raises(UsageError, match=r"^--amp fp16: needs an accelerator[^\n]*$"):
        make_accelerator(config.amp)


def test_an_unknown_backend_of_the_compiler_is_named(make_trainer: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--torchcompile inducto: no such .* mean .inductor.\?"):
        make_trainer(tmp_path / "run", torchcompile="inducto")


def test_a_compiler_that_fails_is_one_line(make_trainer: Make, tmp_path: Path) -> None:
    def broken(graph: Any, examples: Any) -> Any:
        raise OSError("no working C++ compiler")

    torch._dynamo.register_backend(broken, name="broken")
    trainer = make_trainer(tmp_path / "run", torchcompile="broken")
    with pytest.raises(
        EnvironmentFault, match=r"^--torchcompile broken: [^\n]*no working C\+\+ compiler[^\n]*$"
    ):
        trainer.fit()
    torch._dynamo.reset()


def test_default_workers_never_exceed_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings(action="error"):  # torch warns of more workers than cores
        DataLoader([0], num_workers=default_workers())
    for cores, expected in ((1, 1), (2, 2), (16, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        assert TrainConfig(model="m", output="o").workers == expected


def test_every_line_of_the_log_has_the_number_of_views(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path / "run", epochs=2, batch_size=8).fit()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert ["48 views" in said[0], "96 views" in said[1]] == [True, True]
    assert [step["samples_viewed"] for step in steps(tmp_path / "run")] == [16, 32, 48, 64, 80, 96]
    header, first, second = (tmp_path / "run/summary.csv").read_text().splitlines()
    column = header.split(",").index("samples_viewed")
    assert [row.split(",")[column] for row in (first, second)] == ["48", "96"]
