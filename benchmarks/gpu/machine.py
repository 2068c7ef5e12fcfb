"""What machine this is: versions, copies between host and device, products."""

import importlib.metadata
import platform

import torch

from benchmarks.gpu._setting import Setting, milliseconds
from scalekd.pipelines._arithmetic import compute_environment, num_cores, strict_float32

_SOFTWARE = ("scalekd", "torch", "torchvision", "timm", "numpy", "pillow", "zarr", "pcodec")
_MEGABYTES = 64


def run(setting: Setting) -> None:
    versions = {}
    for name in _SOFTWARE:
        versions[name] = importlib.metadata.version(name)
    with strict_float32():
        environment = compute_environment(setting.device, "torch", None)
    setting.report(
        "machine",
        tiny=setting.tiny,
        cores=num_cores(),
        python=platform.python_version(),
        software=versions,
        environment=environment,
    )
    if setting.device.type == "cuda":
        setting.part("machine", "copies and products", lambda: _rates(setting))


def _rates(setting: Setting) -> None:
    size = _MEGABYTES << 20
    on_device = torch.empty(size, dtype=torch.uint8, device="cuda")
    pageable = torch.empty(size, dtype=torch.uint8)
    pinned = pageable.pin_memory()

    def rate(work: object) -> float:
        return round(size / milliseconds(work, tiny=False, seconds=0.3) / 1e6, 1)  # type: ignore[arg-type]

    half = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    single = half.float()
    flop = 2 * 4096**3
    setting.report(
        "machine",
        part="copies and products",
        gigabytes_per_second={
            "pageable to device": rate(lambda: on_device.copy_(pageable)),
            "pinned to device": rate(lambda: on_device.copy_(pinned, non_blocking=True)),
            "device to pageable": rate(lambda: on_device.cpu()),
            "device to pinned": rate(lambda: pinned.copy_(on_device, non_blocking=True)),
        },
        teraflops={
            name: round(flop / milliseconds(work, tiny=False, seconds=0.3) / 1e9)
            for name, work in (("bf16", lambda: half @ half), ("fp32", lambda: single @ single))
        },
    )
