"""The published pairs by FLOP count and one step each: what a cache saves at the scale it is for.

FLOPs are counted by ``torch.utils.flop_counter`` over one real step (forward and backward; a
product and a sum are two), and the step is timed with AdamW's update. Weights are random: they
change no cost.
Targets are made up; they come through the transform codec's decoder at its usual rate.
"""

import gc
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings, measured
from benchmarks.speed._training import Steps, make_steps
from scalekd.cache import TargetDecoder
from scalekd.cache.codecs import CacheCodecs
from scalekd.codecs import create_logit_codec
from scalekd.teachers import TeacherConfig, load_teacher

_TEACHER = "swin_l"
_STUDENTS = ("resnet50", "vit_s16", "mobilenetv1", "mixer_s16")
_BATCH = 2  # the least that batch norm takes


def run(settings: Settings) -> dict[str, Any]:
    teacher = load_teacher(TeacherConfig(model=_TEACHER, pretrained=False))
    num_classes, size = teacher.spec.num_classes or 1000, teacher.spec.img_size
    codec, logits = _inputs.swin_codec(settings), create_logit_codec("full", num_classes)
    decoder = TargetDecoder(CacheCodecs({4: codec}, logits), features=True, logits=True)
    features = _inputs.made_up_features(_inputs.SWIN_L, _BATCH, seed=1)
    scores = np.random.default_rng(0).standard_normal((_BATCH, num_classes), np.float32)
    stage4 = codec.tensors(codec.encode(features))
    batch: dict[str, Tensor] = {
        "pixels": torch.randint(0, 256, (_BATCH, 3, *size), dtype=torch.uint8),
        "label": torch.arange(_BATCH),
        **{f"stage4.{name}": plane for name, plane in stage4.items()},
        **{f"logits.{n}": plane for n, plane in logits.tensors(logits.encode(scores)).items()},
    }
    rows: list[dict[str, Any]] = []
    for student in _STUDENTS[:2] if settings.quick else _STUDENTS:
        steps = make_steps(student, img_size=size[0], teacher=teacher, decoder=decoder, batch=batch)
        rows.append({"teacher": _TEACHER, "student": student, **_row(steps, settings)})
        del steps
        gc.collect()
    return {"batch_size": _BATCH, "pairs": rows}


def _row(steps: Steps, settings: Settings) -> dict[str, Any]:
    arms = {"cached": steps.cached, "online": steps.online, "teacher": steps.teacher}
    flops = {}
    for name, step in arms.items():
        # Fused attention on CPUs has no formula in torch; its parts have.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
        flops[name] = counter.get_total_flops() / _BATCH
    turns = 1 if settings.quick else 3
    seconds = {
        name: min(measured(step).cpu for _ in range(turns)) / _BATCH for name, step in arms.items()
    }
    return {
        "gflop_per_view": {name: value / 1e9 for name, value in flops.items()},
        "cpu_seconds_per_view": seconds,
        "flops": _ratios(flops),
        "seconds": _ratios(seconds),
    }


def _ratios(cost: dict[str, float]) -> dict[str, float]:
    limit = cost["online"] - cost["teacher"]
    return {
        "cached_over_online": cost["cached"] / cost["online"],
        "limit_over_online": limit / cost["online"],
        "cached_over_limit": cost["cached"] / limit,
        "online_over_cached": cost["online"] / cost["cached"],
    }
