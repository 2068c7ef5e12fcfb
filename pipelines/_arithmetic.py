"""How a machine computes targets: precision, TF32, processes, and the facts a cache records."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
_DRAWING_PROCESSES = 16  # 5,000 views/s of JPEG files: more than a large teacher takes


def num_cores() -> int:
    """Return the number of cores of this process; processes of one machine share them evenly."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // processes)


def default_num_workers() -> int:
    """Return the number of processes that draw views: two on CPUs, otherwise by the cores."""
    if not torch.accelerator.is_available():
        return 2  # enough for a teacher on CPUs, which is slow
    return min(max(2, num_cores() - 2), _DRAWING_PROCESSES)


def default_device() -> torch.device:
    """Return the accelerator of this machine; the CPU if it has none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def auto_precision(device: torch.device) -> Precision:
    """Return bf16 for accelerators that multiply bfloat16 natively, and fp32 for other devices."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "xpu" else "fp32"


@contextmanager
def strict_float32() -> Iterator[None]:
    """Disable TF32 inside the block: it keeps 10 of the 23 mantissa bits of the operands.

    cuDNN's convolutions use TF32 by default, and NVIDIA's containers switch it on for products.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def compute_environment(device: torch.device, encoder: str, compiler: str | None) -> dict[str, str]:
    """Describe the machine, as far as it decides how targets are rounded.

    Args:
        device: Device of the teacher.
        encoder: Implementation that encodes features, ``numpy`` or ``torch``.
        compiler: Backend of ``torch.compile``, if the teacher is compiled.
    """
    facts = {"device": _device_name(device), "encoder": encoder, "torch": torch.__version__}
    if compiler is not None:
        facts["compiler"] = compiler
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        major, minor = torch.cuda.get_device_capability(device)
        facts |= {
            "capability": f"{major}.{minor}",
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": str(cudnn.version()),
            "tf32": _tf32(),
            "attention": _attention(),
        }
        driver = _driver()
        if driver:
            facts["driver"] = driver
    return facts


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({platform.machine()})"
    return device.type


def _tf32() -> str:
    used = [
        name
        for name, backend in (
            ("matmul", torch.backends.cuda.matmul),
            ("cudnn", torch.backends.cudnn),
        )
        if backend.allow_tf32
    ]
    return ", ".join(used) or "off"


def _attention() -> str:
    """Return the enabled backends of scaled dot product attention; torch chooses among them."""
    cuda: Any = torch.backends.cuda
    enabled = {
        "cudnn": cuda.cudnn_sdp_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return ", ".join(name for name, is_on in enabled.items() if is_on)


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; ``None`` if the system does not report it."""
    try:
        with Path("/proc/driver/nvidia/version").open() as file:
            line = file.readline()
    except OSError:
        return None
    words = [word for word in line.split() if word.replace(".", "").isdigit() and "." in word]
    return words[0] if words else None
