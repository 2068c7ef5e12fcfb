"""Processes, device and precision of a run, decided by its options and never by the environment.

`accelerate launch`, its configuration file and the shell pass settings on as environment variables,
some of which would change the gradient without a message: `ACCELERATE_GRADIENT_ACCUMULATION_STEPS`
divides every loss once more. A setting that has an option here is overridden, and a note says so;
one that training cannot work with is refused.
"""

import os
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

from scalekd.errors import UsageError
from scalekd.training.precision import choose_precision

_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
_OFF = ("", "0", "n", "no", "f", "false", "off")


def make_accelerator(
    amp: Literal["auto", "bf16", "fp16", "no"],
    *,
    log_with: Sequence[str] = (),
    output: str | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Accelerator:
    """Build the accelerator of a run.

    Args:
        amp: Precision; see `choose_precision`.
        log_with: Names of trackers.
        output: Folder that trackers write to.
        note: Receives a sentence for each setting of the environment that is overridden.

    Raises:
        UsageError: The machine cannot compute in the precision, or the environment asks for a
            way of training that is not supported.
    """
    for name, what in _REFUSED.items():
        if _is_on(name):
            raise UsageError(
                f"{name} is set: scalekd trains with DistributedDataParallel and not with {what}; "
                "unset the variable, or choose another configuration file of accelerate"
            )
    cpu = not torch.accelerator.is_available() or _is_on("ACCELERATE_USE_CPU")
    precision = choose_precision(amp, cpu=cpu)
    for line in _overridden(precision):
        note(line)
    if _is_on("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"):
        torch.set_float32_matmul_precision("highest")
    # Accelerate keeps the first precision of a process for good; the next run may want another.
    AcceleratorState._reset_state()
    try:
        return Accelerator(
            # Accelerate starts gloo for processes on CPUs only if `cpu` is set; otherwise each
            # process would train alone.
            cpu=cpu,
            mixed_precision=precision,
            # Objects, because Accelerate prefers the environment to plain arguments.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            log_with=list(log_with) or None,
            project_dir=output,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise UsageError(f"--amp {amp}: {error}") from error


def _overridden(precision: str) -> list[str]:
    """List settings of the environment that the options override."""
    asked = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--grad-accum-steps decides"),
        "ACCELERATE_GRADIENT_CLIPPING": ("none", "--clip-grad decides"),
        # `accelerate launch` always sets these two; "no" is what it sets where nothing was asked.
        "ACCELERATE_MIXED_PRECISION": ("no", f"--amp decides, here {precision}"),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "--torchcompile decides"),
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("0", "float32 products are computed in float32"),
    }
    return [
        f"{name}={os.environ[name]} is ignored: {what}"
        for name, (default, what) in asked.items()
        if _is_on(name) and os.environ[name].lower() not in (default, precision)
    ]


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in _OFF
