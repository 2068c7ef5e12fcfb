"""Which precision a machine computes fastest in, without losing accuracy that matters."""

from typing import Literal

import torch

from scalekd.errors import UsageError

Precision = Literal["bf16", "fp16", "no"]

AUTOCAST_DTYPES: dict[Precision, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "no": None,
}


def choose_precision(
    requested: Literal["auto", "bf16", "fp16", "no"], *, cpu: bool = False
) -> Precision:
    """Choose bfloat16 for ``auto`` where the device multiplies it natively, or full precision.

    A CPU without AMX or AVX512-BF16 emulates it: there it was measured eight times slower than
    full precision, while CPUs that have it are several times faster.

    Args:
        requested: Value of ``--amp``.
        cpu: Compute on the CPU even where there is an accelerator.

    Raises:
        UsageError: Half precision on a CPU, where Accelerate would silently use full precision.
    """
    accelerated = torch.accelerator.is_available() and not cpu
    if requested == "fp16" and not accelerated:
        raise UsageError(
            "--amp fp16: needs an accelerator, and this machine has none; take bf16 or no"
        )
    if requested != "auto":
        return requested
    if accelerated:
        kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
        if kind == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if kind == "xpu" else "no"
    # Private, and absent from some builds of torch: a missing answer counts as no.
    answers = (
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return "bf16" if any(answers) else "no"
