"""The environment decides nothing that an option decides, and what it cannot have is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scalekd.errors import UsageError
from scalekd.pipelines.train_student import train_student
from scalekd.training import TrainConfig
from scalekd.training.accelerator import make_accelerator


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--grad-accum-steps"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "--clip-grad"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--amp"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "--amp"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "--amp"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--torchcompile"),
    ],
)
def test_a_setting_with_an_option_is_overridden_with_a_note(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, option: str
) -> None:
    monkeypatch.setenv(name, value)
    notes: list[str] = []
    accelerator = make_accelerator("no", note=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith(f"{name}={value} is ignored: {option} decides")
    model = torch.nn.Linear(1, 1)
    prepared = accelerator.prepare(model)
    loss = prepared(torch.ones(1, 1)).sum()
    accelerator.backward(loss)
    assert model.weight.grad is not None
    assert model.weight.grad.item() == 1.0  # not divided by anything
    assert accelerator.mixed_precision == "no"
    assert not hasattr(prepared, "_orig_mod")


def test_variables_that_the_launcher_always_sets_give_no_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    notes: list[str] = []
    make_accelerator("no", note=notes.append)
    assert notes == []


@pytest.mark.parametrize("value", ["true", "True", "1", "yes"])
@pytest.mark.parametrize(
    "name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"]
)
def test_other_ways_of_training_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)
    with pytest.raises(UsageError, match=rf"^ACCELERATE_USE_{name} is set: [^\n]*$"):
        make_accelerator("auto")


def test_a_cpu_is_used_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert make_accelerator("no").device.type == "cpu"
    with pytest.raises(UsageError, match="--amp fp16"):
        make_accelerator("fp16")


def test_float32_products_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import torch, sys\n"
        "from scalekd.training.accelerator import make_accelerator\n"
        "notes = []\n"
        "make_accelerator('no', note=notes.append)\n"
        "print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, *notes)"
    )
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("highest False TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 is ignored")


def test_a_run_does_not_depend_on_the_environment(
    cache: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        config = TrainConfig(
            cache=str(cache),
            data_dir=str(image_folder),
            model="test_resnet",
            epochs=1,
            batch_size=16,
            workers=0,
            amp="no",
            objective="kd",
            output=str(tmp_path / steps),
        )
        norms.append(train_student(config).metrics["train_grad_norm"])
    assert norms[0] == norms[1]
